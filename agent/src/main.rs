//! `husk-agent`: the first process of a pod's virtual machine.

fn main() {}
