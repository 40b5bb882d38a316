//! `huskd`: the CRI server of a node.

fn main() {}
