//! `husk-vmm`: one process that runs one pod's virtual machine.

fn main() {}
