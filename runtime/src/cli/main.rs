//! `husk`: the command line.

fn main() {}
