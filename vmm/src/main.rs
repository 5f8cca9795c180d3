//! The `exopatch` command.

fn main() {}
