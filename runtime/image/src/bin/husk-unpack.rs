//! The unpacker as a program of its own, for tests: huskd runs the same code by starting
//! itself.

fn main() -> std::process::ExitCode {
    husk_image::unpack::main()
}
