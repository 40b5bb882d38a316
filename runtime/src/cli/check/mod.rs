//! `husk check`: can pods run on this machine, and if not, what is missing.

use std::process::ExitCode;

mod kvm;
mod report;

use report::Report;

/// Says whether pods can run here, and what to do about what is missing.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only whether KVM can run pods.
    #[arg(long, alias = "kvm-only")]
    kvm: bool,
}

/// Exit code 0 when pods can run here, 1 when they cannot.
pub fn run(_arguments: &Arguments) -> ExitCode {
    let mut report = Report::default();
    report.add("kvm", kvm::check());
    print!("{report}");
    if report.can_run() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
