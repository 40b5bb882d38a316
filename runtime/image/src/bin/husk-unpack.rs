//! The unpacker as a program of its own: huskd runs the same code by starting itself. For
//! tests, which are not huskd.

fn main() -> std::process::ExitCode {
    husk_image::unpack::main()
}
