//! Which kernel a guest runs, and where: from an [`Image`] and a paused guest to a [`Kernel`].
//!
//! Holding a [`Kernel`] proves that the guest's memory held the image's build-id where the image says it lies, under
//! the KASLR slide that the processor's own interrupt table gives. [`Kernel::prove_same`] proves it again, cheaply,
//! under a later pause: a reset, a kexec or a crash kernel fails it.
//! Sources: Intel SDM vol. 3A, 6.14.1 (64-bit gates); kernel `arch/x86/kernel/{head_64.S,idt.c}`.

use std::sync::Arc;

use super::image::Image;
use super::layout::Layout;
use super::symbols::SymbolError;
use super::types::TypeError;
use crate::addr::{Gpa, Gva, LinkAddr};
use crate::guest::{ReadPhys, Vcpu, VcpuState};
use crate::x86::paging::{PageTables, PagingError};

/// Bytes of an interrupt gate in 64-bit mode.
const GATE: usize = 16;
/// The kernel moves by multiples of this (`CONFIG_PHYSICAL_ALIGN` is at least this on x86-64).
pub(super) const SLIDE_STEP: u64 = 2 << 20;
/// The kernel's image and its slide stay within this (`KERNEL_IMAGE_SIZE`).
pub(super) const SLIDE_END: u64 = 1 << 30;
/// With page-table isolation the user's tables are the next page after the kernel's (`PTI_USER_PGTABLE_BIT`).
pub(super) const USER_TABLES: u64 = 1 << 12;

/// Why the kernel of the image was not found in the guest.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// No vCPU runs.
    #[error("no vCPU of the guest has been started")]
    NoVcpu,
    /// A vCPU does not run a kernel's address space (yet).
    #[error(
        "vCPU {vcpu} does not run the kernel of the image, or has not got that far in its boot: {source}"
    )]
    Paging {
        /// Index of the vCPU.
        vcpu: usize,
        /// What its page tables say.
        source: PagingError,
    },
    /// Interrupt 0 is handled by something else.
    #[error(
        "vCPU {vcpu} handles interrupt 0 at {handler}, which is not {symbol} of the image under any KASLR slide: it runs \
         another kernel, or has not got that far in its boot"
    )]
    Slide {
        /// Index of the vCPU.
        vcpu: usize,
        /// Its handler of interrupt 0.
        handler: Gva,
        /// The symbol it should be.
        symbol: &'static str,
    },
    /// The guest's memory has another build-id.
    #[error("the guest runs another build of the kernel: its build-id is {}, the image's {}", hex(.found), hex(.expected))]
    BuildId {
        /// What the guest's memory holds.
        found: Vec<u8>,
        /// The image's.
        expected: Vec<u8>,
    },
    /// Since the kernel was located, it has been replaced.
    #[error(
        "the guest no longer runs the kernel that was located (reset, kexec or crash kernel): vCPU {vcpu} has {what}"
    )]
    Changed {
        /// Index of the vCPU.
        vcpu: usize,
        /// What differs.
        what: &'static str,
    },
    /// The image lacks a symbol that is needed.
    #[error("the kernel cannot be located: {0}")]
    Symbol(#[from] SymbolError),
    /// The image lacks a type that is needed.
    #[error("the kernel cannot be located: {0}")]
    Type(#[from] TypeError),
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why something of the running kernel cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The image lacks a symbol.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The image lacks a type or a member.
    #[error(transparent)]
    Type(#[from] TypeError),
    /// The guest's memory cannot be read where the kernel says.
    #[error(transparent)]
    Read(#[from] PagingError),
    /// The guest's memory holds what no kernel of this image would.
    #[error("the guest's {what} is unsound at {at}: {value:#x}")]
    Unsound {
        /// The structure.
        what: &'static str,
        /// Where.
        at: Gva,
        /// The value found.
        value: u64,
    },
}

/// A kernel image, and where and how the guest runs it. Plain data: it stays true while the guest runs that kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    image: Arc<Image>,
    slide: u64,
    tables: PageTables,
    idt: Gva,
    idt_at: Gpa,
    divide_error: LinkAddr,
    build_id_at: Gpa,
    layout: Arc<Layout>,
}

/// A vCPU's page tables, and its handler of interrupt 0.
pub(super) struct Gate {
    pub(super) tables: PageTables,
    /// Where the interrupt table is.
    at: Gpa,
    pub(super) handler: Gva,
}

/// What the interrupt table of one vCPU tells.
struct Idt {
    base: Gva,
    at: Gpa,
    slide: u64,
}

/// The handler of interrupt 0.
pub(super) const DIVIDE_ERROR: &str = "asm_exc_divide_error";

impl Kernel {
    /// Finds the kernel `image` in `guest`, by the registers of any vCPU that has been started.
    ///
    /// # Errors
    /// When the guest runs another kernel or none yet, or the image lacks what is needed to tell.
    pub fn locate<R: ReadPhys + ?Sized>(
        image: Arc<Image>,
        guest: &R,
        vcpus: &[Vcpu],
    ) -> Result<Self, LocateError> {
        let divide_error = image.symbols().lookup(DIVIDE_ERROR)?.address;
        let root = image.symbols().lookup("init_top_pgt")?.address;
        let layout = Arc::new(Layout::resolve(&image)?);
        let mut failure = LocateError::NoVcpu;
        for (vcpu, registers) in vcpus
            .iter()
            .enumerate()
            .filter(|(_, vcpu)| vcpu.state != VcpuState::Offline)
        {
            for user_tables in [0, USER_TABLES] {
                let started = Start {
                    vcpu,
                    registers,
                    user_tables,
                };
                match started.locate(&image, guest, divide_error, root) {
                    Ok((tables, idt, build_id_at)) => {
                        let (idt, idt_at, slide) = (idt.base, idt.at, idt.slide);
                        return Ok(Self {
                            image,
                            slide,
                            tables,
                            idt,
                            idt_at,
                            divide_error,
                            build_id_at,
                            layout,
                        });
                    }
                    Err(LocateError::BuildId { found, expected }) => {
                        return Err(LocateError::BuildId { found, expected });
                    }
                    Err(LocateError::Paging { .. })
                        if matches!(failure, LocateError::Slide { .. }) => {}
                    Err(other) => failure = other,
                }
            }
        }
        Err(failure)
    }

    /// Proves that the guest, paused with `vcpus`, still runs this kernel: the build-id is where it was, and every vCPU
    /// handles interrupts through the same table, at the same place in memory, with the same slide.
    ///
    /// # Errors
    /// [`LocateError::Changed`] and what else [`Kernel::locate`] may find.
    pub fn prove_same<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        vcpus: &[Vcpu],
    ) -> Result<(), LocateError> {
        let mut found = vec![0; self.image.build_id().len()];
        let read = guest.read_phys(self.build_id_at, &mut found);
        if read.is_err() || found != self.image.build_id() {
            return Err(LocateError::Changed {
                vcpu: 0,
                what: "another build-id in memory",
            });
        }
        let mut proved = false;
        for (vcpu, registers) in vcpus
            .iter()
            .enumerate()
            .filter(|(_, vcpu)| vcpu.state != VcpuState::Offline)
        {
            let idt = Start {
                vcpu,
                registers,
                user_tables: 0,
            }
            .idt(guest, self.divide_error)?
            .1;
            if (idt.base, idt.at) != (self.idt, self.idt_at) {
                return Err(LocateError::Changed {
                    vcpu,
                    what: "another interrupt table",
                });
            }
            if idt.slide != self.slide {
                return Err(LocateError::Changed {
                    vcpu,
                    what: "another KASLR slide",
                });
            }
            proved = true;
        }
        if proved {
            Ok(())
        } else {
            Err(LocateError::NoVcpu)
        }
    }

    /// The image that the guest runs.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Runtime address minus link address, modulo 2^64.
    #[must_use]
    pub fn slide(&self) -> u64 {
        self.slide
    }

    /// The kernel's own page tables (`init_top_pgt`), which map all of it and no user's memory.
    #[must_use]
    pub fn tables(&self) -> PageTables {
        self.tables
    }

    /// Where the kernel keeps what: resolved once.
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where `at` of the image is in the running kernel.
    #[must_use]
    pub fn runtime(&self, at: LinkAddr) -> Gva {
        Gva(at.0.wrapping_add(self.slide))
    }

    /// Where `at` of the running kernel is in its image, or `None` when no section of the image is there.
    #[must_use]
    pub fn link(&self, at: Gva) -> Option<LinkAddr> {
        let link = LinkAddr(at.0.wrapping_sub(self.slide));
        self.image
            .sections()
            .iter()
            .any(|section| section.range.contains(&link))
            .then_some(link)
    }

    /// The running kernel's address of the one symbol called `name`.
    ///
    /// # Errors
    /// When there is none, several, or it is a per-CPU symbol.
    pub fn symbol(&self, name: &str) -> Result<Gva, SymbolError> {
        let symbol = self.image.symbols().lookup(name)?;
        if symbol.percpu {
            return Err(SymbolError::PerCpu {
                name: name.to_owned(),
            });
        }
        Ok(self.runtime(symbol.address))
    }

    /// The guest-physical address behind `at`, by a walk of the kernel's page tables.
    ///
    /// # Errors
    /// When it is not mapped, or a table is malformed or outside memory.
    pub fn translate<R: ReadPhys + ?Sized>(&self, guest: &R, at: Gva) -> Result<Gpa, PagingError> {
        self.tables.translate(guest, at).map(|mapping| mapping.at)
    }

    /// Fills `buf` from the kernel's memory at `at`.
    ///
    /// # Errors
    /// As [`Kernel::translate`], for any page of it.
    pub fn read<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        at: Gva,
        buf: &mut [u8],
    ) -> Result<(), PagingError> {
        self.tables.read(guest, at, buf)
    }

    /// The eight bytes at `at`, as a number.
    ///
    /// # Errors
    /// As [`Kernel::read`].
    pub fn read_u64<R: ReadPhys + ?Sized>(&self, guest: &R, at: Gva) -> Result<u64, PagingError> {
        let mut bytes = [0; 8];
        self.read(guest, at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The four bytes at `at`, as a number.
    ///
    /// # Errors
    /// As [`Kernel::read`].
    pub fn read_u32<R: ReadPhys + ?Sized>(&self, guest: &R, at: Gva) -> Result<u32, PagingError> {
        let mut bytes = [0; 4];
        self.read(guest, at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }
}

/// One way to begin: a vCPU, and which bit of its CR3 to disregard.
pub(super) struct Start<'a> {
    pub(super) vcpu: usize,
    pub(super) registers: &'a Vcpu,
    pub(super) user_tables: u64,
}

impl Start<'_> {
    fn paging(&self) -> impl Fn(PagingError) -> LocateError + use<> {
        let vcpu = self.vcpu;
        move |source| LocateError::Paging { vcpu, source }
    }

    /// The vCPU's page tables, and its handler of interrupt 0.
    pub(super) fn gate<R: ReadPhys + ?Sized>(&self, guest: &R) -> Result<Gate, PagingError> {
        let mut tables = PageTables::of(self.registers)?;
        tables.root = Gpa(tables.root.0 & !self.user_tables);
        let base = Gva(self.registers.idt_base);
        let at = tables.translate(guest, base)?.at;
        let mut gate = [0; GATE];
        tables.read(guest, base, &mut gate)?;
        let [a, b, _, _, _, _, c, d, e, f, g, h, ..] = gate;
        let handler = Gva(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        Ok(Gate {
            tables,
            at,
            handler,
        })
    }

    /// The vCPU's page tables, and what its interrupt table tells.
    fn idt<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
        divide_error: LinkAddr,
    ) -> Result<(PageTables, Idt), LocateError> {
        let gate = self.gate(guest).map_err(self.paging())?;
        let Gate {
            tables,
            at,
            handler,
        } = gate;
        let base = Gva(self.registers.idt_base);
        let slide = handler.0.wrapping_sub(divide_error.0);
        // A kernel that is moved down would wrap; those of x86-64 are linked at the lowest place.
        if !slide.is_multiple_of(SLIDE_STEP) || slide >= SLIDE_END {
            return Err(LocateError::Slide {
                vcpu: self.vcpu,
                handler,
                symbol: DIVIDE_ERROR,
            });
        }
        Ok((tables, Idt { base, at, slide }))
    }

    fn locate<R: ReadPhys + ?Sized>(
        &self,
        image: &Image,
        guest: &R,
        divide_error: LinkAddr,
        root: LinkAddr,
    ) -> Result<(PageTables, Idt, Gpa), LocateError> {
        let (own, idt) = self.idt(guest, divide_error)?;
        let runtime = |at: LinkAddr| Gva(at.0.wrapping_add(idt.slide));
        let root = own
            .translate(guest, runtime(root))
            .map_err(self.paging())?
            .at;
        let tables = PageTables {
            root,
            levels: own.levels,
        };
        let at = runtime(image.build_id_at());
        let build_id_at = tables.translate(guest, at).map_err(self.paging())?.at;
        let expected = image.build_id().to_vec();
        let mut found = vec![0; expected.len()];
        tables.read(guest, at, &mut found).map_err(self.paging())?;
        if found != expected {
            return Err(LocateError::BuildId { found, expected });
        }
        Ok((tables, idt, build_id_at))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Gva, Image, Kernel, LinkAddr, LocateError, VcpuState};
    use crate::kernel::boot::BootState;
    use crate::kernel::testing::guest::{ENTRY_AREA, SLIDE, TinyGuest};
    use crate::kernel::testing::{FORMS, Form, RODATA, TEXT, image};

    fn locate(guest: &TinyGuest) -> Result<Kernel, LocateError> {
        Kernel::locate(
            Arc::new(Image::parse(Arc::new(image(guest.form))).unwrap()),
            guest,
            &guest.vcpus,
        )
    }

    fn refused(guest: &TinyGuest, want: &str) {
        let got = locate(guest).unwrap_err().to_string();
        assert!(got.contains(want), "{got}");
    }

    #[test]
    fn a_moved_kernel_is_found_in_every_form() {
        for form in FORMS {
            for levels in [4, 5] {
                let guest = TinyGuest::new(form, levels);
                let kernel = locate(&guest).unwrap();
                assert_eq!((kernel.slide(), kernel.tables().levels), (SLIDE, levels));
                assert_eq!(kernel.symbol("victim").unwrap(), Gva(TEXT + SLIDE + 0x300));
                assert_eq!(
                    kernel.link(Gva(TEXT + SLIDE + 0x300)),
                    Some(LinkAddr(TEXT + 0x300))
                );
                assert_eq!(kernel.link(Gva(TEXT + 0x300)), None);
                assert!(kernel.symbol("runqueues").is_err());
                kernel.prove_same(&guest, &guest.vcpus).unwrap();
            }
        }
    }

    #[test]
    fn a_vcpu_on_the_users_page_tables_leads_to_the_kernels() {
        let mut guest = TinyGuest::new(Form::New, 4);
        let root = guest.vcpus[0].cr3;
        guest.isolate();
        let kernel = locate(&guest).unwrap();
        assert_eq!(kernel.tables().root.0, root);
        kernel.prove_same(&guest, &guest.vcpus).unwrap();
    }

    #[test]
    fn what_is_not_the_kernel_is_refused_with_the_reason() {
        let mut guest = TinyGuest::new(Form::New, 4);
        guest
            .vcpus
            .iter_mut()
            .for_each(|vcpu| vcpu.state = VcpuState::Offline);
        refused(&guest, "no vCPU");
        let mut guest = TinyGuest::new(Form::New, 4);
        guest.vcpus.iter_mut().for_each(|vcpu| vcpu.cr0 = 1);
        refused(&guest, "does not translate addresses");
        let mut guest = TinyGuest::new(Form::New, 4);
        guest.put(RODATA + SLIDE + 0x7_0000 + 24 + 12, 0);
        refused(&guest, "another build of the kernel");
        let mut guest = TinyGuest::new(Form::New, 4);
        let gate = guest.get(ENTRY_AREA);
        guest.put(ENTRY_AREA, gate + 16);
        refused(&guest, "vCPU 1 handles interrupt 0 at");
        let mut guest = TinyGuest::new(Form::New, 4);
        guest
            .vcpus
            .iter_mut()
            .for_each(|vcpu| vcpu.idt_base = 0x1000);
        refused(&guest, "is not mapped");
    }

    #[test]
    fn a_replaced_kernel_is_noticed() {
        let check = |change: fn(&mut TinyGuest), want: &str| {
            let mut guest = TinyGuest::new(Form::OldSorted, 4);
            let kernel = locate(&guest).unwrap();
            change(&mut guest);
            let got = kernel
                .prove_same(&guest, &guest.vcpus)
                .unwrap_err()
                .to_string();
            assert!(got.contains(want), "{got}");
        };
        check(
            |guest| guest.put(RODATA + SLIDE + 0x7_0000 + 24 + 12, 0),
            "another build-id",
        );
        check(
            |guest| guest.put(ENTRY_AREA, guest.get(ENTRY_AREA) ^ 1 << 61),
            "another KASLR slide",
        );
        check(
            |guest| {
                let page = guest.page();
                let idt = [guest.get(ENTRY_AREA), guest.get(ENTRY_AREA + 8)];
                guest.map(ENTRY_AREA, page, 1);
                guest.put(ENTRY_AREA, idt[0]);
                guest.put(ENTRY_AREA + 8, idt[1]);
            },
            "another interrupt table",
        );
        check(|guest| guest.vcpus[1].cr0 = 1, "vCPU 1 does not run");
    }

    #[test]
    fn boot_states_have_their_names() {
        let check = |value: u64, want: Option<BootState>| {
            let mut guest = TinyGuest::new(Form::Old, 4);
            guest.put(guest.at("system_state"), value);
            let kernel = locate(&guest).unwrap();
            assert_eq!(kernel.boot_state(&guest).ok(), want);
        };
        check(
            0,
            Some(BootState::NotFinished {
                state: "SYSTEM_BOOTING".to_owned(),
            }),
        );
        check(3, Some(BootState::Running));
        check(
            4,
            Some(BootState::Ending {
                state: "SYSTEM_HALT".to_owned(),
            }),
        );
        check(9, None);
    }
}
