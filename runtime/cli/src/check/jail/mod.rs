//! `husk check --jail`: the walls around the processes that a pod's guest talks to, as the
//! kernel shows them. Nothing is taken from what was configured.

use std::path::Path;

use anyhow::bail;
use husk_base::dirs::sandbox_run_dir;
use husk_base::id::SandboxId;
use husk_config::Config;
use serde_json::Value;

mod process;
mod walls;

use process::Process;
use walls::Wall;

use crate::client;

/// Prints every wall of a pod. True if all of them hold.
///
/// # Errors
/// The pod has no VM, or huskd does not answer.
pub async fn run(config: &Config, pod: &str) -> anyhow::Result<bool> {
    let mut huskd = client::connect(&config.socket).await?;
    let id = client::find(&client::pods(&mut huskd).await?, pod)?.id.clone();
    if client::control(config, &id).is_none() {
        bail!("pod {id} has no VM: its containers are the host's");
    }
    let status = client::status(&mut huskd, &id).await?;
    let info = client::info(&status.info);
    if info.is_null() {
        bail!("huskd tells nothing of the pod's VM");
    }
    let vmm = info.get("pid").and_then(Value::as_u64).and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
    let cgroup = info.get("cgroup").and_then(Value::as_str).map(Path::new);
    let run_dir = sandbox_run_dir(&config.run_dir, &SandboxId::from(id.as_str()));
    let mut walls = of_vmm(vmm, &run_dir, cgroup);
    walls.extend(of_file_server(&run_dir, cgroup));
    print!("{}", walls::table(&walls));
    Ok(walls.iter().all(Wall::holds))
}

fn of_vmm(pid: u32, run_dir: &Path, cgroup: Option<&Path>) -> Vec<Wall> {
    const NAME: &str = "husk-vmm";
    let user = std::fs::read_to_string(run_dir.join("user")).ok().and_then(|user| user.trim().parse().ok());
    match Process::read(pid) {
        Ok(process) => walls::of_vmm(NAME, &process, user, cgroup),
        Err(error) => vec![Wall::broken(NAME, "process", format!("process {pid}: {error}"))],
    }
}

/// A pod without volumes has no file server.
fn of_file_server(run_dir: &Path, cgroup: Option<&Path>) -> Vec<Wall> {
    const NAME: &str = "husk-fs";
    let Ok(recorded) = std::fs::read_to_string(run_dir.join("fs.process")) else { return Vec::new() };
    let words = recorded
        .split_once(' ')
        .and_then(|(pid, began)| Some((pid.parse::<u32>().ok()?, began.trim().parse::<u64>().ok()?)));
    let Some((pid, began)) = words else {
        return vec![Wall::broken(NAME, "process", "its record does not read".to_owned())];
    };
    match Process::read(pid) {
        // Another process may have the number by now.
        Ok(process) if process.began == began => walls::of_file_server(NAME, &process, cgroup),
        _ => vec![Wall::broken(NAME, "process", "it has ended: restart the pod".to_owned())],
    }
}
