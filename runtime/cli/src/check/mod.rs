//! `husk check`: says whether pods can run on this machine, and if not, what is missing.

use std::path::Path;
use std::process::ExitCode;

use husk_config::{Config, Error};

mod files;
mod host;
mod jail;
mod kvm;
mod report;

use report::{Finding, Report};

/// Checks whether pods can run on this machine, and says how to fix what is missing.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Check KVM only.
    #[arg(long, alias = "kvm-only")]
    kvm: bool,
    /// Say for each wall around the VMM and the file server of this pod whether it holds, as
    /// the kernel shows it, and check nothing else. The exit code is 1 if one does not.
    #[arg(long, value_name = "POD", conflicts_with = "kvm")]
    jail: Option<String>,
}

/// Prints the walls around a pod. The exit code is 0 if all of them hold, 1 if they do not.
async fn jail(pod: &str, config: Result<Config, Error>) -> ExitCode {
    let checked = match config {
        Ok(config) => jail::run(&config, pod).await,
        Err(error) => Err(error.into()),
    };
    match checked {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("husk: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints the report. The exit code is 0 if pods can run here, 1 if they cannot.
pub async fn run(arguments: &Arguments, path: &Path, config: Result<Config, Error>) -> ExitCode {
    if let Some(pod) = &arguments.jail {
        return jail(pod, config).await;
    }
    let mut report = Report::default();
    report.add("kvm", kvm::check());
    if !arguments.kvm {
        let config = match config {
            Ok(config) => {
                report.add("configuration", Finding::Ok(described(path)));
                config
            }
            Err(error) => {
                report.add(
                    "configuration",
                    Finding::missing(husk_base::chain(&error), format!("edit {}", path.display())),
                );
                Config::default()
            }
        };
        host::check(&mut report, &config).await;
        files::check(&mut report, &config);
        host::huskd(&mut report, &config).await;
    }
    print!("{report}");
    if report.can_run() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn described(path: &Path) -> String {
    if path.exists() {
        path.display().to_string()
    } else {
        format!("defaults, there is no {}", path.display())
    }
}
