//! A worker: does its cases one after the other, and says before each which it is.

use cap::Cap;

use crate::{Options, target};

/// How much more memory than before a case may take, in bytes: a few times what an undamaged kernel takes.
const MEMORY: usize = 256 << 20;

/// Does the cases. A case that panics or takes too much memory ends the process; that is for the one that started it to tell.
pub(crate) fn work(options: &Options, allocator: &Cap<std::alloc::System>) -> Result<(), String> {
    let [name] = &options.targets[..] else {
        return Err("a worker has one target".to_owned());
    };
    let target = target::find(name).ok_or("a target that is not known")?;
    let mut subject = (target.make)(options)?;
    for case in options.first..options.first.saturating_add(options.cases) {
        println!("{case}");
        allocator
            .set_limit(allocator.allocated() + MEMORY)
            .map_err(|()| "the limit of memory cannot be set".to_owned())?;
        subject(case);
    }
    Ok(())
}
