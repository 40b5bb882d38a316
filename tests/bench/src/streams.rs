//! What goes in and out of a running container: commands, output, forwarded ports, files of volumes. Each runtime does
//! the same, one after another, with one pod.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::Runtimes;
use crate::cri::{Client, Target};
use crate::inside::files::{Amount, Speeds};

mod exec;
mod output;
mod pod;
mod ports;
mod report;
mod volume;
mod websocket;

pub use report::render;

use pod::{Log, Pod};

/// How much of everything.
#[derive(Debug, clap::Args)]
pub struct Plan {
    /// crictl, the client of forwarded ports. Without it they are left out.
    #[arg(long)]
    crictl: Option<PathBuf>,
    /// A folder of the file system that the volume shall be on. Nothing stays there.
    #[arg(long, default_value = "/var/tmp")]
    folder: PathBuf,
    /// How many commands.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    commands: u16,
    /// How much output, and how much through a forwarded port, MiB.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    mebibytes: u64,
    #[command(flatten)]
    files: Amount,
}

/// What came out.
#[derive(Debug, Serialize)]
pub struct Measurement {
    pub runtimes: Vec<Runtime>,
    /// The volume's folder, without a runtime.
    pub host_files: Speeds,
    pub mebibytes: u64,
    pub small_files: u32,
    pub large_file_mib: u64,
}

/// One runtime's.
#[derive(Debug, Serialize)]
pub struct Runtime {
    pub name: String,
    pub version: String,
    pub handler: String,
    pub exec: exec::Exec,
    pub output: output::Output,
    pub ports: Option<ports::Ports>,
    pub files: Speeds,
}

/// Does it all. Pods that were started are ended, also on failure.
pub async fn measure(runtimes: &Runtimes, plan: &Plan) -> anyhow::Result<Measurement> {
    let folder = tempfile::tempdir_in(&plan.folder).context("make a folder")?;
    let mut measured = Vec::new();
    for target in runtimes.targets() {
        let what = format!("measure {}", target.name);
        measured.push(runtime(target, runtimes, plan, folder.path()).await.context(what)?);
    }
    Ok(Measurement {
        runtimes: measured,
        host_files: volume::on_host(&folder.path().join("volume"), plan.files).await?,
        mebibytes: plan.mebibytes,
        small_files: plan.files.files,
        large_file_mib: plan.files.file_mib,
    })
}

async fn runtime(target: Target, runtimes: &Runtimes, plan: &Plan, folder: &Path) -> anyhow::Result<Runtime> {
    let mut client = Client::connect(&target, runtimes.timeout()).await?;
    let version = client.version().await?;
    eprintln!("{}: {version}, handler `{}`", target.name, target.handler);
    client.pull(&runtimes.image).await?;
    let mut pod = Pod::run(&client, &runtimes.image, folder).await?;
    let measured = in_pod(&mut pod, target, version, plan).await;
    let ended = pod.end().await;
    let measured = measured?;
    ended.map(|()| measured)
}

async fn in_pod(pod: &mut Pod, target: Target, version: String, plan: &Plan) -> anyhow::Result<Runtime> {
    let server = pod.start("server", &["serve", &ports::PORT.to_string()], false).await?;
    server.log.wait_for(Log::has_begun).await?;
    let rounds = plan.files.rounds;

    let exec = exec::measure(pod, &server, plan.commands).await?;
    eprintln!(". commands");
    let output = output::measure(pod, plan.mebibytes, rounds).await?;
    eprintln!(". output");
    let ports = match &plan.crictl {
        Some(crictl) => {
            let forwarded = ports::measure(crictl, &target.endpoint, &pod.sandbox, plan.mebibytes, rounds);
            Some(forwarded.await?)
        }
        None => None,
    };
    eprintln!("{}", if ports.is_some() { ". ports" } else { ". no ports, as there is no crictl" });
    let files = volume::measure(pod, &server, plan.files).await?;
    eprintln!(". files");
    let Target { name, handler, .. } = target;
    Ok(Runtime { name, version, handler, exec, output, ports, files })
}
