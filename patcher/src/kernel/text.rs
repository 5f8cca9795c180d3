//! What the running kernel's text must hold, from its image and its relocations.
//!
//! Where the kernel patches itself, the image alone cannot tell: such bytes are refused, with the patch site that makes
//! them undecidable. How the kernel returns is read from the guest, and believed only if all that was read agrees.

use std::ops::Range;

use super::image::NotShipped;
use super::locate::{Kernel, KernelError};
use super::relocs::RelocError;
use super::sites::{Site, SiteKind};
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::bytes::le_i32;
use crate::x86::paging::PagingError;

/// A relocated field has at most so many bytes.
const FIELD: u64 = 8;
/// Return sites that are looked at to tell how the kernel returns.
const RETURNS: usize = 64;
const RET: u8 = 0xc3;
const INT3: u8 = 0xcc;
const JMP: u8 = 0xe9;

/// Why the bytes that text must hold cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// Not the kernel's own text.
    #[error("{range:x?} is not text of the kernel's image")]
    NotText {
        /// What was asked for.
        range: Range<Gva>,
    },
    /// The kernel patches them itself.
    #[error("the bytes at {} depend on the running kernel: it has a site of kind {:?} there", .at, .site.kind)]
    Undecidable {
        /// Where the site is in the running kernel.
        at: Gva,
        /// The site.
        site: Site,
    },
    /// The image's relocations do not say.
    #[error(transparent)]
    Reloc(#[from] RelocError),
    /// What the image says of its text is not known.
    #[error(transparent)]
    NotShipped(#[from] NotShipped),
}

/// Why it cannot be told how the kernel returns.
#[derive(Debug, thiserror::Error)]
pub enum ReturnError {
    /// Something of the kernel could not be found or read.
    #[error("how the kernel returns cannot be read: {0}")]
    Kernel(#[from] KernelError),
    /// Where it returns is not known.
    #[error("how the kernel returns cannot be read: {0}")]
    NotShipped(#[from] NotShipped),
    /// It returns in a way that is not known here.
    #[error(
        "the return at {at} holds {bytes:02x?}, which is neither a plain return nor a jump to the kernel's return thunk"
    )]
    Unknown {
        /// The return site.
        at: Gva,
        /// Its bytes.
        bytes: [u8; 5],
    },
    /// Two return sites jump to different places.
    #[error("the return at {at} jumps to {target}, others to {thunk}")]
    Differ {
        /// The return site.
        at: Gva,
        /// Where it jumps.
        target: Gva,
        /// Where others jump.
        thunk: Gva,
    },
}

/// How functions of the running kernel return, as its mitigations demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReturnForm {
    /// `ret`, and `int3` behind it.
    Ret,
    /// A jump to this thunk.
    Jump(Gva),
}

impl Kernel {
    /// The bytes that the kernel's text at `range` must hold: the image's, relocated.
    ///
    /// A call site ([`SiteKind::Call`]) is taken as unpatched; entries that do not change bytes ([`SiteKind::Extable`],
    /// [`SiteKind::Bug`]) do not matter here, though they may to the caller.
    ///
    /// # Errors
    /// [`TextError::Undecidable`] where the kernel patches itself.
    pub fn expected_text(&self, range: Range<Gva>) -> Result<Vec<u8>, TextError> {
        let link = LinkAddr(range.start.0.wrapping_sub(self.slide()))
            ..LinkAddr(range.end.0.wrapping_sub(self.slide()));
        let sites = self.image().shipped()?.sites().within(link);
        match sites.into_iter().find(|site| changes(site.kind)) {
            Some(site) => Err(TextError::Undecidable {
                at: self.runtime(site.range.start),
                site,
            }),
            None => self.shipped_text(range),
        }
    }

    /// The bytes that the image says of the kernel's text at `range`, relocated: what is there may differ where the kernel patches itself.
    ///
    /// # Errors
    /// When that is no text, or the image does not say.
    pub fn shipped_text(&self, range: Range<Gva>) -> Result<Vec<u8>, TextError> {
        let link = LinkAddr(range.start.0.wrapping_sub(self.slide()))
            ..LinkAddr(range.end.0.wrapping_sub(self.slide()));
        let shipped = self.image().shipped()?;
        let section = self.image().sections().iter().find(|section| {
            section.executable && section.range.start <= link.start && link.end <= section.range.end
        });
        let not_text = || TextError::NotText {
            range: range.clone(),
        };
        let section = section
            .filter(|_| link.start < link.end)
            .ok_or_else(not_text)?;
        // Relocated fields may straddle the edge of what was asked for; within this they are whole.
        let first = LinkAddr(link.start.0.saturating_sub(FIELD)).max(section.range.start);
        let last = LinkAddr(link.end.0.saturating_add(FIELD)).min(section.range.end);
        let mut bytes = shipped.text(first..last).ok_or_else(not_text)?.to_vec();
        let inside = |at: LinkAddr| {
            at.offset_from(first)
                .and_then(|at| usize::try_from(at).ok())
        };
        shipped.relocs().apply(first, &mut bytes, self.slide())?;
        let wanted = inside(link.start)
            .zip(inside(link.end))
            .and_then(|(start, end)| bytes.get(start..end));
        wanted.map(<[u8]>::to_vec).ok_or_else(not_text)
    }

    /// How the kernel's functions return: read from its live text, at return sites of its image.
    ///
    /// # Errors
    /// When any of them holds something unknown, or they disagree.
    pub fn return_form<R: ReadPhys + ?Sized>(&self, guest: &R) -> Result<ReturnForm, ReturnError> {
        let mut thunk = None;
        let text = self
            .image()
            .sections()
            .iter()
            .find(|section| section.name == ".text");
        let text = text.map_or(LinkAddr(0)..LinkAddr(0), |section| section.range.clone());
        let shipped = self.image().shipped()?;
        for site in shipped.sites().first(SiteKind::ReturnThunk, &text, RETURNS) {
            let at = self.runtime(site.range.start);
            let mut bytes = [0; 5];
            self.read(guest, at, &mut bytes)
                .map_err(KernelError::from)?;
            // Some mitigations patch only the returns that need it, so plain ones may stand beside jumps.
            let target = match bytes {
                [RET, INT3, INT3, INT3, INT3] => continue,
                [JMP, rest @ ..] => {
                    le_i32(&rest, 0).and_then(|offset| at.checked_offset(i64::from(offset) + 5))
                }
                _ => None,
            };
            let target = target.ok_or(ReturnError::Unknown { at, bytes })?;
            if *thunk.get_or_insert(target) != target {
                return Err(ReturnError::Differ {
                    at,
                    target,
                    thunk: thunk.unwrap_or(target),
                });
            }
        }
        let Some(target) = thunk else {
            return Ok(ReturnForm::Ret);
        };
        self.check_thunk(guest, target)?;
        Ok(ReturnForm::Jump(target))
    }

    /// The kernel's pointer to its return thunk, where it has one, must agree with what its returns do.
    fn check_thunk<R: ReadPhys + ?Sized>(&self, guest: &R, target: Gva) -> Result<(), ReturnError> {
        if !self.image().symbols().has("x86_return_thunk") {
            return Ok(());
        }
        let at = self.symbol("x86_return_thunk").map_err(KernelError::from)?;
        let thunk = Gva(self.read_u64(guest, at).map_err(KernelError::from)?);
        if thunk == target {
            Ok(())
        } else {
            Err(ReturnError::Differ { at, target, thunk })
        }
    }

    /// Whether the kernel's live text at `range` is what [`Kernel::expected_text`] says, and else where it first differs.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn differs<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        at: Gva,
        expected: &[u8],
    ) -> Result<Option<Gva>, PagingError> {
        let mut live = vec![0; expected.len()];
        self.read(guest, at, &mut live)?;
        let difference = live
            .iter()
            .zip(expected)
            .position(|(live, expected)| live != expected);
        Ok(difference.and_then(|index| at.checked_add(index as u64)))
    }
}

/// Whether the kernel changes the bytes of a site of this kind, once or ever.
fn changes(kind: SiteKind) -> bool {
    match kind {
        SiteKind::Call | SiteKind::Extable | SiteKind::Bug => false,
        SiteKind::Alternative
        | SiteKind::Paravirt
        | SiteKind::Retpoline
        | SiteKind::ReturnThunk
        | SiteKind::JumpLabel
        | SiteKind::StaticCall
        | SiteKind::Fentry
        | SiteKind::SmpLock
        | SiteKind::IbtEndbr
        | SiteKind::RuntimeConst => true,
    }
}

#[cfg(test)]
mod tests {
    use super::{Gva, ReturnForm, SiteKind, TextError};
    use crate::kernel::sites::Site;
    use crate::kernel::testing::guest::{SLIDE, TinyGuest};
    use crate::kernel::testing::{FORMS, Form, TEXT};

    const VICTIM: u64 = TEXT + SLIDE + 0x300;

    #[test]
    fn text_is_that_of_the_image_relocated() {
        for form in FORMS {
            let mut guest = TinyGuest::new(form, 4);
            let kernel = guest.kernel();
            let expected = kernel
                .expected_text(Gva(VICTIM + 5)..Gva(VICTIM + 16))
                .unwrap();
            assert_eq!(
                expected,
                [0x55, 0x48, 0xc7, 0xc0, 0, 0, 0x60, 0x93, 0x48, 0x89, 0xe5]
            );
            assert_eq!(
                kernel.differs(&guest, Gva(VICTIM + 5), &expected).unwrap(),
                None
            );
            // A range that cuts the relocated field holds its part of it.
            assert_eq!(
                kernel
                    .expected_text(Gva(VICTIM + 11)..Gva(VICTIM + 12))
                    .unwrap(),
                [0x60]
            );
            guest.put(VICTIM + 12, 0);
            assert_eq!(
                kernel.differs(&guest, Gva(VICTIM + 5), &expected).unwrap(),
                Some(Gva(VICTIM + 12))
            );
        }
    }

    #[test]
    fn undecidable_text_is_refused() {
        let mut guest = TinyGuest::new(Form::New, 4);
        let kernel = guest.kernel();
        match kernel.expected_text(Gva(VICTIM + 13)..Gva(VICTIM + 17)) {
            Err(TextError::Undecidable {
                at,
                site:
                    Site {
                        kind: SiteKind::ReturnThunk,
                        ..
                    },
            }) => {
                assert_eq!(at, Gva(VICTIM + 16));
            }
            other => panic!("{other:?}"),
        }
        for range in [
            Gva(TEXT)..Gva(TEXT + 8),
            Gva(VICTIM)..Gva(VICTIM),
            Gva(VICTIM + 8)..Gva(VICTIM),
        ] {
            let got = kernel.expected_text(range.clone());
            assert!(
                matches!(got, Err(TextError::NotText { .. })),
                "{range:?} {got:?}"
            );
        }
    }

    #[test]
    fn the_form_of_returns_is_what_all_of_them_are() {
        let check = |bytes: u64, thunk: u64, want: Result<ReturnForm, &str>| {
            let mut guest = TinyGuest::new(Form::OldSorted, 5);
            guest.put(VICTIM + 16, bytes);
            guest.put(guest.at("x86_return_thunk"), thunk);
            let got = guest.kernel().return_form(&guest);
            match (got, want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want),
                (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{got}"),
                (got, want) => panic!("{got:?} instead of {want:?}"),
            }
        };
        let thunk = TEXT + SLIDE + 0x400;
        check(0x00cc_cccc_ccc3, thunk, Ok(ReturnForm::Ret));
        check(0xebe9, thunk, Ok(ReturnForm::Jump(Gva(thunk))));
        check(0xebe9, thunk + 16, Err("jumps to"));
        check(0x90c3, thunk, Err("neither a plain return"));
    }
}
