//! Packages that replace many functions: system calls that the running kernel lets be redirected, whose editions only call the original.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use patcher::addr::Gva;
use patcher::edition::link::Returns;
use patcher::edition::object::Edition;
use patcher::guest::ReadPhys;
use patcher::kernel::locate::Kernel;
use patcher::kernel::text::ReturnForm;
use patcher::plan::target::Target;
use tests::stock::{self, Stock};

/// How the entries of system calls are called: all have one prototype.
const ENTRY: &str = "__x64_sys_";

/// Builds a package in `dir` that replaces that many functions of the kernel that `guest` runs.
pub(crate) fn package<R: ReadPhys>(
    stock: Stock,
    kernel: &Kernel,
    guest: &R,
    count: usize,
    dir: &Path,
) -> Result<PathBuf, String> {
    let returns = kernel.return_form(guest);
    let returns = match returns.map_err(|error| error.to_string())? {
        ReturnForm::Ret => Returns::Plain,
        ReturnForm::Jump(thunk) => Returns::Thunk(thunk),
    };
    let can_be = |name: &String| {
        let edition = Edition {
            function: name.clone(),
            position: 0,
            section: 0,
            offset: 0,
        };
        let nowhere = Gva(0)..Gva(0);
        Target::find(kernel, guest, &edition, &nowhere, returns, |_| None).is_ok()
    };
    let names = kernel.image().symbols().iter().map(|symbol| symbol.name);
    let entries = names.filter(|name| name.starts_with(ENTRY)).filter(can_be);
    let names: Vec<String> = entries.take(count).collect();
    if names.len() < count {
        return Err(format!(
            "only {} system calls can be redirected",
            names.len()
        ));
    }
    let source = dir.join(format!("many_{count}.c"));
    std::fs::write(&source, text(&names)).map_err(|error| error.to_string())?;
    let package = source.with_extension("xpu");
    let kernel = stock.file("vmlinuz");
    let built = Command::new(stock::exopatch())
        .arg("build")
        .arg(&source)
        .args(["--kernel".as_ref(), kernel.as_os_str()])
        .arg("--headers")
        .arg(kernel.with_file_name("headers"))
        .arg("-o")
        .arg(&package)
        .output()
        .map_err(|error| error.to_string())?;
    if !built.status.success() {
        return Err(String::from_utf8_lossy(&built.stderr).into_owned());
    }
    Ok(package)
}

/// The source of editions of these system calls.
fn text(names: &[String]) -> String {
    let mut text = "#include <linux/ptrace.h>\n#include \"exopatch.h\"\n".to_owned();
    for name in names {
        let edition = format!("edition_of{name}");
        let _ = write!(
            text,
            "static long {edition}(const struct pt_regs *regs);\n\
             EXOPATCH_REPLACES({name}, {edition});\n\
             static long {edition}(const struct pt_regs *regs)\n{{\n\treturn EXOPATCH_ORIGINAL({name})(regs);\n}}\n"
        );
    }
    text
}
