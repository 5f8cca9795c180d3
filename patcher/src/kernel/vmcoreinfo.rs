//! What the running kernel says of its own layout, for tools that read core files (kernel `kernel/vmcore_info.c`).

use super::locate::{Kernel, KernelError};
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::guest::core::vmcoreinfo_in;
use crate::x86::paging::{PageTables, PagingError};

/// `VMCOREINFO_BYTES`.
const MOST: u64 = 4096;

impl Kernel {
    /// The text of the kernel's `VMCOREINFO` note, or `None` where it keeps none.
    ///
    /// # Errors
    /// When it cannot be read, or is no such text.
    pub fn vmcoreinfo<R: ReadPhys + ?Sized>(
        &self,
        guest: &R,
    ) -> Result<Option<Vec<u8>>, KernelError> {
        let symbols = self.image().symbols();
        let (Some(data), Some(size)) = (
            symbols.optional("vmcoreinfo_data")?,
            symbols.optional("vmcoreinfo_size")?,
        ) else {
            return Ok(None);
        };
        let (data, size) = (self.runtime(data.address), self.runtime(size.address));
        text(guest, self.tables(), data, size)
    }
}

/// The text whose address is at `data` and whose length is at `size`, or `None` where there is none yet.
pub(crate) fn text<R: ReadPhys + ?Sized>(
    guest: &R,
    tables: PageTables,
    data: Gva,
    size: Gva,
) -> Result<Option<Vec<u8>>, KernelError> {
    let word = |at: Gva| {
        let mut bytes = [0; 8];
        tables.read(guest, at, &mut bytes)?;
        Ok::<u64, PagingError>(u64::from_le_bytes(bytes))
    };
    let (at, len) = (Gva(word(data)?), word(size)?);
    let unsound = || KernelError::Unsound {
        what: "vmcoreinfo",
        at,
        value: len,
    };
    if at == Gva(0) || len == 0 {
        return Ok(None);
    }
    if len > MOST {
        return Err(unsound());
    }
    let mut text = vec![0; usize::try_from(len).unwrap_or(0)];
    tables.read(guest, at, &mut text)?;
    if vmcoreinfo_in(&text) == Some(&text) {
        Ok(Some(text))
    } else {
        Err(unsound())
    }
}

/// How far the kernel that `text` is of has moved (`KERNELOFFSET`), where it says.
pub(crate) fn slide(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let mut lines = text.lines();
    let offset = lines.find_map(|line| line.strip_prefix("KERNELOFFSET="))?;
    u64::from_str_radix(offset, 16).ok()
}

#[cfg(test)]
mod tests {
    use crate::kernel::testing::FORMS;
    use crate::kernel::testing::guest::TinyGuest;

    const TEXT: &[u8] = b"OSRELEASE=6\nPAGESIZE=4096\nSYMBOL(a)=1\nKERNELOFFSET=0\n";

    #[test]
    fn the_kernels_own_text_is_read_or_refused() {
        for form in FORMS {
            let check = |len: u64, text: &[u8], want: Result<Option<&[u8]>, &str>| {
                let mut guest = TinyGuest::new(form, 4);
                let page = guest.object(4096);
                guest.put_bytes(page, text);
                let (data, size) = (guest.at("vmcoreinfo_data"), guest.at("vmcoreinfo_size"));
                guest.put(data, page);
                guest.put(size, len);
                let got = guest
                    .kernel()
                    .vmcoreinfo(&guest)
                    .map_err(|error| error.to_string());
                match (got, want) {
                    (Ok(got), Ok(want)) => assert_eq!(got.as_deref(), want),
                    (Err(got), Err(want)) => assert!(got.contains(want), "{got}"),
                    (got, want) => panic!("{got:?} instead of {want:?}"),
                }
            };
            let len = TEXT.len() as u64;
            check(len, TEXT, Ok(Some(TEXT)));
            check(0, TEXT, Ok(None));
            check(len - 1, TEXT, Err("vmcoreinfo is unsound"));
            check(len + 1, TEXT, Err("vmcoreinfo is unsound"));
            check(4097, TEXT, Err("vmcoreinfo is unsound"));
            check(len, b"OSRELEASE=", Err("vmcoreinfo is unsound"));
        }
    }
}
