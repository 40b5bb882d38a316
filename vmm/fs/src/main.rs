//! `husk-fs`: one process that serves one pod's volumes.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use husk_fs::{Passthrough, Policy, filter, jail, server};
use husk_vmm_api::words;

const USAGE: &str = "usage: husk-fs --id <sandbox id> --root <directory> [--uids <first>:<count>]...
               [--gids <first>:<count>]... [--trusted <how names of trusted volumes begin>]
It is started by huskd; its standard input is a connected SOCK_SEQPACKET unix
socket. One packet says that it is ready; from then on each packet is one
FUSE message.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            words::say(format_args!("husk-fs: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let Some(arguments) = Arguments::parse(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(());
    };
    let socket = rustix::io::dup(std::io::stdin()).context("take the socket")?;
    words::log_to_standard_error().context("map the log")?;
    std::panic::set_hook(Box::new(|panic| words::say(format_args!("husk-fs: internal error: {panic}"))));
    let open_files = jail::enter(&arguments.root)?;
    let files = Passthrough::new("/".as_ref(), open_files, arguments.policy).context("open the root")?;
    filter::install().context("restrict system calls")?;
    rustix::io::write(&socket, husk_vmm_api::FILE_SERVER_READY).context("say that all is ready")?;
    server::serve(socket, files).context("serve")
}

/// The arguments. There are few, which no library needs to parse.
struct Arguments {
    root: PathBuf,
    policy: Policy,
}

impl Arguments {
    /// Parses the arguments; `None` when help is asked for.
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let mut root = None;
        let mut policy = Policy::default();
        while let Some(word) = words.next() {
            if word == "--help" || word == "-h" {
                return Ok(None);
            }
            let value = words.next().with_context(|| format!("{word} needs a value\n{USAGE}"))?;
            match word.as_str() {
                // The sandbox id, shown in a list of processes.
                "--id" => {}
                "--root" => root = Some(value.into()),
                "--uids" => policy.uids.push(value.parse().context("--uids")?),
                "--gids" => policy.gids.push(value.parse().context("--gids")?),
                "--trusted" => policy.trusted = Some(value),
                _ => bail!("unknown argument {word}\n{USAGE}"),
            }
        }
        let root = root.with_context(|| format!("--root is missing\n{USAGE}"))?;
        Ok(Some(Self { root, policy }))
    }
}
