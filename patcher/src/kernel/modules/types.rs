//! The types that a module brings, which stand on the kernel's: the guest's copy of its BTF, as `/sys/kernel/btf/NAME` shows it.
//!
//! The module's own section is gone once it is loaded; the kernel keeps a list of what it parsed. A copy is believed only if it stands on
//! the very types that the image has. Source: kernel `kernel/bpf/btf.c` (`btf_module_notify()`, `btf_parse_module()`).

use std::sync::Arc;

use super::{MAX_MODULES, Module, ModuleError};
use crate::addr::{Gva, LinkAddr};
use crate::guest::ReadPhys;
use crate::kernel::gather::{Bound, Gather};
use crate::kernel::image::Image;
use crate::kernel::locate::{Kernel, KernelError};
use crate::kernel::memory::Memory;
use crate::kernel::types::{TypeError, Types};

/// Bytes that the types of one module may have (`BTF_MAX_SIZE`).
const MAX_LEN: u32 = 16 << 20;

/// Where the kernel keeps the types of modules.
struct Layout {
    head: LinkAddr,
    link: u64,
    module: u64,
    types: u64,
    data: u64,
    len: u64,
    first: u64,
    first_string: u64,
}

impl Layout {
    /// `None` for a kernel that keeps none.
    fn resolve(image: &Image) -> Result<Option<Self>, ModuleError> {
        const ENTRY: &str = "btf_module";
        const TYPES: &str = "btf";
        let types = image.types();
        let Some(head) = image.symbols().optional("btf_modules")? else {
            return Ok(None);
        };
        if !types.has_member(ENTRY, "btf") {
            return Ok(None);
        }
        Ok(Some(Self {
            head: head.address,
            link: types.offset_of(ENTRY, "list")?,
            module: types.offset_of(ENTRY, "module")?,
            types: types.offset_of(ENTRY, "btf")?,
            data: types.offset_of(TYPES, "data")?,
            len: types.offset_of(TYPES, "data_size")?,
            first: types.offset_of(TYPES, "start_id")?,
            first_string: types.offset_of(TYPES, "start_str_off")?,
        }))
    }
}

impl Module {
    /// The bytes of the module's types, as the guest has them; `None` if it brought none.
    ///
    /// # Errors
    /// When they cannot be read, or stand on other types than the image's.
    pub fn btf<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        guest: &R,
    ) -> Result<Option<Vec<u8>>, ModuleError> {
        let Some(layout) = Layout::resolve(kernel.image())? else {
            return Ok(None);
        };
        let memory = Memory::new(kernel, guest)?;
        let Some(types) = self.find_types(kernel, &memory, &layout)? else {
            return Ok(None);
        };
        let gather = Gather::new(&[
            (layout.data, 8),
            (layout.len, 4),
            (layout.first, 4),
            (layout.first_string, 4),
        ]);
        let mut fields = gather.fields();
        fields.read(&memory, types)?;
        let unsound = |what, value: u32| {
            ModuleError::Kernel(KernelError::Unsound {
                what,
                at: types,
                value: value.into(),
            })
        };
        let (first, first_string) = kernel.image().types().behind();
        let stands_on = (fields.u32(layout.first), fields.u32(layout.first_string));
        if stands_on != (first, first_string) {
            let what = "module's types, which stand on others than the image's: their first";
            return Err(unsound(what, stands_on.0));
        }
        let len = fields.u32(layout.len);
        if len > MAX_LEN {
            return Err(unsound("length of a module's types", len));
        }
        let mut bytes = vec![0; len as usize];
        memory.read(Gva(fields.u64(layout.data)), &mut bytes)?;
        Ok(Some(bytes))
    }

    /// The module's types with the kernel's that they stand on; `None` if it brought none.
    ///
    /// # Errors
    /// As [`Module::btf`], and when they are damaged.
    pub fn types<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        guest: &R,
    ) -> Result<Option<Types>, ModuleError> {
        let Some(bytes) = self.btf(kernel, guest)? else {
            return Ok(None);
        };
        let base = kernel.image().shared_types();
        let types: Result<Types, TypeError> = Types::parse_module(Arc::new(bytes), base);
        Ok(Some(types?))
    }

    /// The kernel's `struct btf` of the module.
    fn find_types<R: ReadPhys + ?Sized>(
        &self,
        kernel: &Kernel,
        memory: &Memory<'_, R>,
        layout: &Layout,
    ) -> Result<Option<Gva>, ModuleError> {
        let gather = Gather::new(&[(layout.link, 8), (layout.module, 8), (layout.types, 8)]);
        let mut fields = gather.fields();
        let mut bound = Bound::new("list of modules' types", MAX_MODULES);
        let head = kernel.runtime(layout.head).0;
        let mut node = memory.u64(Gva(head))?;
        while node != head {
            bound.step(node)?;
            fields.read(memory, Gva(node.wrapping_sub(layout.link)))?;
            if fields.u64(layout.module) == self.at.0 {
                return Ok(Some(Gva(fields.u64(layout.types))));
            }
            node = fields.u64(layout.link);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use crate::kernel::modules::read;
    use crate::kernel::modules::tests::fixture;
    use crate::kernel::testing::guest::TinyGuest;
    use crate::kernel::testing::views::module_btf;
    use crate::kernel::testing::{FORMS, Form};
    use crate::kernel::types::Types;

    /// What `ask` finds in the types of the module `alpha`, whose description `change` changes: where its `struct btf` is, where its bytes.
    fn asked<T>(
        form: Form,
        change: impl Fn(&mut TinyGuest, u64, u64),
        ask: impl Fn(&Types) -> T,
    ) -> Result<Option<T>, String> {
        let mut fixture = fixture(form);
        let guest = &mut fixture.guest;
        let image = guest.kernel();
        let (first, first_string) = image.image().types().behind();
        let bytes = module_btf(first, first_string);
        let data = guest.object(8192).next_multiple_of(4096);
        guest.put_bytes(data, &bytes);
        let [entry, types] = [64, 256].map(|len| guest.object(len));
        guest.put(entry + 16, fixture.alpha);
        guest.put(entry + 24, types);
        guest.put(types, data);
        guest.put(types + 8, bytes.len() as u64);
        guest.put(types + 16, u64::from(first) | u64::from(first_string) << 32);
        guest.list(guest.at("btf_modules"), &[entry]);
        change(guest, types, data);
        let kernel = guest.kernel();
        let modules = read(&kernel, guest).unwrap();
        let found = |name: &str| {
            let module = modules.iter().find(|module| module.name == name).unwrap();
            module.types(&kernel, guest)
        };
        let types = found("alpha").map_err(|error| error.to_string())?;
        assert!(found("beta").unwrap().is_none());
        Ok(types.as_ref().map(ask))
    }

    #[test]
    fn a_modules_types_stand_on_the_kernels() {
        for form in FORMS {
            let offsets = asked(
                form,
                |_, _, _| {},
                |types| {
                    let offset = |name: &str, path: &str| types.offset_of(name, path).ok();
                    assert_eq!(
                        types.enumerator("alpha_mode", "ALPHA_LARGE"),
                        Ok(5 | 1 << 32)
                    );
                    [
                        offset("alpha_private", "link.prev"),
                        offset("alpha_private", "owner"),
                        // The kernel's own.
                        offset("task_struct", "pid"),
                        offset("list_head", "prev"),
                        offset("alpha_private", "nothing"),
                    ]
                },
            );
            let want = [Some(24), Some(32), Some(0x68), Some(8), None];
            assert_eq!(offsets, Ok(Some(want)), "{form:?}");
            let text = asked(
                form,
                |_, _, _| {},
                |types| {
                    let own = types.layouts("alpha_private").unwrap();
                    let of_kernel = types.layouts("list_head").unwrap();
                    (own[0].to_string(), of_kernel.len(), types.len())
                },
            );
            let (own, of_kernel, count) = text.unwrap().unwrap();
            assert!(own.contains("struct list_head link;"), "{own}");
            assert!(own.contains("struct task_struct *owner;"), "{own}");
            assert!(own.contains("flag:3;"), "{own}");
            assert_eq!((of_kernel, count), (1, 3));
        }
    }

    #[test]
    fn types_that_stand_on_others_or_make_no_sense_are_refused() {
        let refused = |change: fn(&mut TinyGuest, u64, u64), want: &str| {
            let got = asked(Form::New, change, |_| ()).unwrap_err();
            assert!(got.contains(want), "{got}");
        };
        refused(
            |guest, types, _| guest.put(types + 16, 7),
            "stand on others than the image's",
        );
        refused(
            |guest, types, _| guest.put(types + 8, 1 << 25),
            "length of a module's types",
        );
        refused(|guest, _, data| guest.put(data, 0), "no BTF magic number");
        refused(
            |guest, _, _| {
                let entry = guest.get(guest.at("btf_modules"));
                guest.put(entry, entry);
                guest.put(entry + 16, 1);
            },
            "list of modules' types",
        );
    }
}
