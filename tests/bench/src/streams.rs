//! Measures commands, output, forwarded ports, and files of volumes of a running container. Each runtime has one pod, and
//! they are measured in turns, so that other work of the machine affects all of them alike.

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

/// How much work is done.
#[derive(Debug, clap::Args)]
pub struct Plan {
    /// Path of crictl, the client of forwarded ports. Without it they are not measured.
    #[arg(long)]
    crictl: Option<PathBuf>,
    /// A directory on the file system for the volume. Nothing stays there.
    #[arg(long, default_value = "/var/tmp")]
    folder: PathBuf,
    /// Number of commands.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    commands: u16,
    /// MiB of output, and MiB through a forwarded port.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    mebibytes: u64,
    #[command(flatten)]
    files: Amount,
}

/// The results.
#[derive(Debug, Serialize)]
pub struct Measurement {
    pub runtimes: Vec<Runtime>,
    /// The speeds of the volume's directory without a runtime.
    pub host_files: Speeds,
    pub mebibytes: u64,
    pub small_files: u32,
    pub large_file_mib: u64,
}

/// The results of one runtime.
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

/// A runtime and its pod.
struct Subject {
    target: Target,
    version: String,
    pod: Pod,
}

/// Does all of the work. Pods that were started are removed, also after a failure.
pub async fn measure(runtimes: &Runtimes, plan: &Plan) -> anyhow::Result<Measurement> {
    let folder = tempfile::tempdir_in(&plan.folder).context("make a folder")?;
    let mut subjects = Vec::new();
    let measured = with_pods(&mut subjects, runtimes, plan, folder.path()).await;
    let mut ended = Ok(());
    for subject in subjects {
        ended = ended.and(subject.pod.end().await);
    }
    let measured = measured?;
    ended.map(|()| measured)
}

async fn with_pods(
    subjects: &mut Vec<Subject>,
    runtimes: &Runtimes,
    plan: &Plan,
    folder: &Path,
) -> anyhow::Result<Measurement> {
    for target in runtimes.targets() {
        let what = format!("start a pod of {}", target.name);
        subjects.push(start(target, runtimes, folder).await.context(what)?);
    }
    let mut servers = Vec::new();
    for Subject { pod, .. } in subjects.iter_mut() {
        let server = pod.start("server", &["serve", &ports::PORT.to_string()], false).await?;
        server.log.wait_for(Log::has_begun).await?;
        servers.push(server);
    }
    eprintln!(". pods");

    let rounds = plan.files.rounds;
    let mut execs = Vec::new();
    for (Subject { pod, target, .. }, server) in subjects.iter_mut().zip(&servers) {
        execs.push(exec::measure(pod, server, plan.commands).await.with_context(|| of(target))?);
    }
    eprintln!(". commands");
    let mut outputs = Vec::new();
    for Subject { pod, target, .. } in subjects.iter_mut() {
        outputs.push(output::measure(pod, plan.mebibytes, rounds).await.with_context(|| of(target))?);
    }
    eprintln!(". output");
    let mut forwarded = Vec::new();
    for Subject { pod, target, .. } in subjects.iter_mut() {
        forwarded.push(match &plan.crictl {
            Some(crictl) => {
                let ports = ports::measure(crictl, &target.endpoint, &pod.sandbox, plan.mebibytes, rounds);
                Some(ports.await.with_context(|| of(target))?)
            }
            None => None,
        });
    }
    eprintln!("{}", if plan.crictl.is_some() { ". ports" } else { ". no ports, as there is no crictl" });
    let host_files = volume::on_host(folder, plan.files).await?;
    let mut files = Vec::new();
    for (Subject { pod, target, .. }, server) in subjects.iter_mut().zip(&servers) {
        files.push(volume::measure(pod, server, plan.files).await.with_context(|| of(target))?);
    }
    eprintln!(". files");

    let figures = execs.into_iter().zip(outputs).zip(forwarded).zip(files);
    let runtime = |(subject, (((exec, output), ports), files)): (&Subject, _)| {
        let Target { name, handler, .. } = subject.target.clone();
        Runtime { name, version: subject.version.clone(), handler, exec, output, ports, files }
    };
    Ok(Measurement {
        runtimes: subjects.iter().zip(figures).map(runtime).collect(),
        host_files,
        mebibytes: plan.mebibytes,
        small_files: plan.files.files,
        large_file_mib: plan.files.file_mib,
    })
}

/// Makes its pod, without containers.
async fn start(target: Target, runtimes: &Runtimes, folder: &Path) -> anyhow::Result<Subject> {
    let mut client = Client::connect(&target, runtimes.timeout()).await?;
    let version = client.version().await?;
    eprintln!("{}: {version}, handler `{}`", target.name, target.handler);
    client.pull(&runtimes.image).await?;
    let pod = Pod::run(&client, &runtimes.image, &folder.join(&target.name)).await?;
    Ok(Subject { target, version, pod })
}

fn of(target: &Target) -> String {
    format!("measure {}", target.name)
}
