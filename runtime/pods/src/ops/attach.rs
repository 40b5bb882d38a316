//! Attach: a client joins what a container says and hears. One that was created and not
//! started can be joined too, so that a client misses nothing of its beginning.
//!
//! The container's log gets everything in any case, and first. A client that
//! does not keep up holds the container up for a while and is then let go, see
//! [`crate::model::fanout`].

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use husk_agent_client::Agent;
use husk_proto::agent::stream::{Kind, StreamHeader};
use husk_streaming::{Client, ExitStatus, Incoming, Outgoing, Session, StreamOptions};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::exec::{check, resize};
use super::ready::pod_of_unended;
use crate::model::Container;
use crate::model::fanout::Subscription;
use crate::{Error, Node};

/// How long a client that has typed its last still sees the answer.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// Answers with the URL at which the client finds the container.
///
/// # Errors
/// A container that has ended, or streams that cannot be had together.
pub fn attach(node: &Arc<Node>, container_id: &str, wanted: StreamOptions) -> Result<String, Error> {
    let (sandbox, container) = node.registry.container(container_id)?;
    check("attach", wanted)?;
    let running = pod_of_unended("attach", &sandbox, &container)?;
    let span = container.span();
    let run = |client| async move { run(&running.agent, &container, client).await }.instrument(span).boxed();
    Ok(node.streaming.offer(Session::Attach(wanted, Box::new(run)))?)
}

/// The client has come.
async fn run(agent: &Agent, container: &Arc<Container>, client: Client) -> ExitStatus {
    let Client { stdin, sizes, stdout, stderr, gone } = client;
    let record = container.record();
    let (once, terminal) = (record.config.stdin_once, record.config.tty);
    // Before it types: it shall see what the container makes of it.
    let stdout = stdout.map(|to| (container.output.stdout.subscribe(), to));
    let stderr = stderr.map(|to| (container.output.stderr.subscribe(), to));
    let output = async {
        // The first that is late ends both.
        match tokio::try_join!(show(stdout), show(stderr)) {
            // Without either, the container's end is what is left to wait for.
            Ok((Shown::NotWanted, Shown::NotWanted)) => container.wait_exited().await,
            Ok(_) => {}
            Err(Late) => {
                return ExitStatus::Failed(
                    "attach: detached, because the output was not taken in time".into(),
                );
            }
        }
        ExitStatus::Success
    };
    let typing = stdin.map(|stdin| type_all(agent.clone(), container.clone(), stdin, once && !terminal));
    let typed = async {
        let whole = match typing {
            Some(typing) => typing.await.is_ok_and(|whole| whole),
            None => false,
        };
        if !whole || once && !terminal {
            // The client goes on to see what the container makes of it.
            std::future::pending().await
        }
        tokio::time::sleep(LAST_ANSWER).await;
    };
    let id = container.id.as_str();
    tokio::select! {
        ending = output => ending,
        () = typed => ExitStatus::Success,
        never = resize(agent, id, "", sizes) => match never {},
        () = gone.cancelled() => ExitStatus::Failed("the client has gone".into()),
    }
}

/// How far one of the container's outputs was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// The client did not ask for it.
    NotWanted,
    /// The output was shown to its end.
    Whole,
}

/// The client had fallen too far behind.
struct Late;

async fn show(stream: Option<(Subscription, Outgoing)>) -> Result<Shown, Late> {
    let Some((mut from, to)) = stream else { return Ok(Shown::NotWanted) };
    while let Some(bytes) = from.next().await {
        if to.send(bytes).await.is_err() {
            return Ok(Shown::Whole);
        }
    }
    let _ = to.finish().await;
    if from.was_dropped() { Err(Late) } else { Ok(Shown::Whole) }
}

/// Passes on all that the client types, as a task of its own: what it has said
/// reaches the container, and so does its end, even if it has gone by then.
/// False if the container ended first.
fn type_all(agent: Agent, container: Arc<Container>, from: Incoming, once: bool) -> JoinHandle<bool> {
    tokio::spawn(async move {
        tokio::select! {
            () = feed(&agent, &container, from, once) => true,
            () = container.wait_exited() => false,
        }
    })
}

/// Passes on what the client types, for as long as the container takes it. With
/// `once`, the container's input ends with it.
async fn feed(agent: &Agent, container: &Container, mut from: Incoming, once: bool) {
    let header =
        StreamHeader { kind: Kind::Stdin, container_id: container.id.to_string(), process_id: String::new() };
    if container.record().config.stdin
        && type_into(agent, container, &header, &mut from, once).await.is_some()
    {
        return;
    }
    // The container does not listen, or not any more.
    while from.recv().await.is_some() {}
}

/// `None` if the container does not take it.
async fn type_into(
    agent: &Agent,
    container: &Container,
    header: &StreamHeader,
    from: &mut Incoming,
    once: bool,
) -> Option<()> {
    loop {
        let bytes = from.recv().await;
        if bytes.is_none() && !once {
            return Some(());
        }
        // One connection for all clients, which stays open after them: to the
        // agent, its end would be that of the container's input.
        let mut held = container.stdin.lock().await;
        let stdin = match &mut *held {
            Some(stdin) => stdin,
            none => none.insert(agent.open_stream(header).await.ok()?),
        };
        let done = match bytes {
            Some(bytes) => stdin.write_all(&bytes).await,
            None => return stdin.shutdown().await.ok(),
        };
        if done.is_err() {
            *held = None;
            return None;
        }
    }
}

#[cfg(test)]
mod tests;
