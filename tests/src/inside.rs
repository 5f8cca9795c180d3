//! A booted guest whose machine runs in this process: a stop costs no call from outside, so that many can be looked at.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use patcher::guest::{Guest as _, Registers as _};
use patcher::kernel::locate::Kernel;
use rustix::fs::OFlags;
use vmm::config::{self, MemorySize, Wanted};
use vmm::kernel_index;
use vmm::kvm::Hypervisor;
use vmm::vm::Vm;

use crate::console::Console;
use crate::guest::{Answer, BOOT_LIMIT, COMMAND_LIMIT, DONE, READY};
use crate::initrd;
use crate::packed;
use crate::stock::Stock;

/// A running guest. Dropping it kills it.
#[derive(Debug)]
pub struct Inside {
    /// Its machine.
    pub vm: Vm,
    input: File,
    console: Console,
}

impl Inside {
    /// Boots `stock` with `cpus` vCPUs and 256 MiB, and waits until it obeys commands.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot(stock: Stock, cpus: u32) -> Self {
        Self::boot_with(stock, cpus, "")
    }

    /// The same with `words` added to the command line.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot_with(stock: Stock, cpus: u32, words: &str) -> Self {
        Self::boot_from(stock, cpus, words, &stock.file("initramfs.cpio.gz"))
    }

    /// The same with files of the host in the guest's `/files`.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn boot_with_files(stock: Stock, cpus: u32, files: &[PathBuf]) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the initrd");
        let initrd = dir.path().join("initrd");
        initrd::write(&initrd, &stock.file("initramfs.cpio.gz"), files)
            .expect("an initrd for the guest");
        Self::boot_from(stock, cpus, "", &initrd)
    }

    fn boot_from(stock: Stock, cpus: u32, words: &str, initrd: &Path) -> Self {
        let options = config::Options {
            kernel: Some(stock.file("vmlinuz")),
            initrd: Some(initrd.to_owned()),
            // The line is for commands alone: the kernel says some things even when it is told to be quiet.
            cmdline: Some(format!("console=null quiet {words}")),
            cpus: Some(cpus),
            memory: Some(MemorySize(256 << 20)),
            console: Some(config::Console::Pty),
            api_sock: None,
        };
        let hypervisor = Hypervisor::open().expect("KVM");
        let limits = hypervisor.limits().expect("KVM's limits");
        let config = Wanted::new(options, None).and_then(|wanted| wanted.validate(limits));
        let config = config.expect("a configuration");
        let vm = Vm::start(&hypervisor, config, None).expect("a machine");
        let terminal = vm.status().pty.expect("a terminal was asked for");
        let mut open = OpenOptions::new();
        // It must not become this process's own: it hangs up when the guest ends.
        let open = open
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOCTTY.bits().cast_signed());
        let input = open.open(&terminal).expect("the guest's terminal");
        let console = Console::follow(input.try_clone().expect("a second handle"));
        let guest = Self { vm, input, console };
        let ready = guest
            .console
            .wait(0, BOOT_LIMIT, |line| line.contains(READY));
        if let Err(why) = ready {
            panic!("no boot: {why}; the guest: {:?}", guest.vm.ended());
        }
        guest
    }

    /// The kernel that it runs.
    ///
    /// # Panics
    /// When it is not found.
    #[must_use]
    pub fn kernel(&self, stock: Stock) -> Kernel {
        let image = kernel_index::load(&stock.file("vmlinuz")).expect("an index");
        let mut machine = self.vm.guest().expect("a guest that nobody else has");
        let deadline = Instant::now() + COMMAND_LIMIT;
        let paused = machine.pause(deadline).expect("a pause");
        Kernel::locate(image.into(), &paused, paused.vcpus()).expect("the kernel")
    }

    /// Runs a shell command of one line in the guest and waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    pub fn sh(&self, command: &str) -> Answer {
        let mark = self.begin(command);
        let end = self
            .console
            .wait(mark, COMMAND_LIMIT, |line| line.starts_with(DONE))
            .unwrap_or_else(|why| {
                let ended = self.vm.ended();
                panic!("'{command}' did not end: {why}; the guest: {ended:?}")
            });
        Answer::between(&self.console, mark, end)
    }

    /// Has the guest begin a shell command of one line, and gives the place of the console where its answer begins.
    ///
    /// # Panics
    /// When the guest takes no input.
    #[must_use]
    pub fn begin(&self, command: &str) -> usize {
        assert!(!command.contains('\n'), "several commands: {command}");
        let mark = self.console.mark();
        writeln!(&self.input, "{command}").expect("the guest takes input");
        mark
    }

    /// The answer of the command that was begun at `mark`, once it has ended.
    #[must_use]
    pub fn answered(&self, mark: usize) -> Option<Answer> {
        let lines = self.console.since(mark);
        let end = lines.iter().position(|line| line.starts_with(DONE))?;
        Some(Answer::between(&self.console, mark, mark + end))
    }

    /// What a command that must succeed prints in the guest.
    ///
    /// # Panics
    /// When it fails.
    pub fn must(&self, command: &str) -> String {
        let answer = self.sh(command);
        assert_eq!(answer.status, 0, "'{command}': {}", answer.text());
        answer.text()
    }

    /// What a file of the guest holds. It comes packed.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn file(&self, path: &str) -> String {
        let digits = self.must(&packed::command(path));
        packed::unpack(&digits).unwrap_or_else(|error| panic!("{path} came damaged: {error}"))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.vm.kill("the end of the test");
        let _ = self.vm.wait();
    }
}
