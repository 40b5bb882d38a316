//! RPCs of a container's processes: exec, signals, waiting, terminals.

use std::fs;
use std::sync::Arc;

use husk_proto::agent::{
    ExecProcessRequest, ExecProcessResponse, ResizeTerminalRequest, ResizeTerminalResponse,
    SignalProcessRequest, SignalProcessResponse, WaitProcessRequest, WaitProcessResponse,
};

use super::container::adopt;
use super::{Agent, Error, Stage};
use crate::container::spec;
use crate::id;
use crate::process::Role;
use crate::process::stdio::{CONSOLES, Stdio};

/// The largest signal number of Linux.
const MAX_SIGNAL: u32 = 64;

/// Serves `ExecProcess`.
pub async fn exec(agent: Arc<Agent>, request: ExecProcessRequest) -> Result<ExecProcessResponse, Error> {
    id::check("process_id", &request.process_id)?;
    if request.args.is_empty() {
        return Err(Error::Invalid("args: nothing to execute".into()));
    }
    let container = agent.containers.get(&request.container_id)?;
    let reservation = container.reserve_exec(&request.process_id)?;

    let bundle = &container.bundle;
    let config = fs::read(bundle.config()).stage("read the bundle")?;
    let config = spec::parse(&config).stage("read the bundle")?;
    let process = spec::exec_process(&config, request.args, request.terminal).stage("read the bundle")?;
    drop(config);
    let call = format!("exec-{}", request.process_id);
    let file = bundle.path().join(format!("{call}.json"));
    let json = serde_json::to_vec(&process).stage("write the process")?;
    fs::write(&file, json).stage("write the process")?;

    let mut stdio = Stdio::new(&agent.mode.at(CONSOLES), request.terminal, request.stdin)
        .stage("open standard streams")?;
    let started =
        agent.runc.exec(&container.id, bundle.path(), &call, &file, &mut stdio).await.stage("runc exec");
    let _ = fs::remove_file(&file);
    // The input of an exec ends with the client that sends it.
    let (process, _) = adopt(started?, stdio, true, Role::Exec, container.cgroup.clone()).await?;
    let pid = process.pid().as_raw().unsigned_abs();
    reservation.publish(process);
    Ok(ExecProcessResponse { pid })
}

/// Serves `SignalProcess`.
pub fn signal(agent: &Agent, request: &SignalProcessRequest) -> Result<SignalProcessResponse, Error> {
    if !(1..=MAX_SIGNAL).contains(&request.signal) {
        return Err(Error::Invalid(format!("signal {} does not exist", request.signal)));
    }
    let signal = request.signal.cast_signed();
    let container = agent.containers.get(&request.container_id)?;
    let process = container.process(&request.process_id)?;
    if request.all {
        container.cgroup.signal(signal).stage("signal the container")?;
    } else {
        process.signal(signal).stage("signal the process")?;
    }
    Ok(SignalProcessResponse {})
}

/// Serves `WaitProcess`.
pub async fn wait(agent: &Agent, request: &WaitProcessRequest) -> Result<WaitProcessResponse, Error> {
    // The container is not held while waiting: a waiter must not keep it from
    // being removed.
    let ended = agent.containers.get(&request.container_id)?.process(&request.process_id)?.ended();
    let outcome = ended.await.ok_or_else(|| {
        Error::NotFound(format!(
            "container {} was removed before its process ended, or before all its output was taken",
            request.container_id
        ))
    })?;
    Ok(WaitProcessResponse {
        exit_code: outcome.exit.code,
        oom_killed: outcome.oom_killed,
        finished_at_unix_nanos: outcome.exit.unix_nanos,
        output_kept: outcome.output_kept,
    })
}

/// Serves `ResizeTerminal`.
pub fn resize(agent: &Agent, request: &ResizeTerminalRequest) -> Result<ResizeTerminalResponse, Error> {
    let side = |number| u16::try_from(number).invalid("terminal size");
    let (rows, columns) = (side(request.rows)?, side(request.columns)?);
    let container = agent.containers.get(&request.container_id)?;
    let process = container.process(&request.process_id)?;
    if !process.resize(rows, columns).stage("resize the terminal")? {
        return Err(Error::Precondition("the process has no terminal".into()));
    }
    Ok(ResizeTerminalResponse {})
}
