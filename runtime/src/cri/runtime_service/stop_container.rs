//! StopContainer: the stop signal, the time of grace, then SIGKILL. A container
//! that is not known or does not run is stopped already. Of several calls the one
//! whose time is over first kills.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_proto::cri::{self, StopContainerRequest, StopContainerResponse};
use tonic::Code;

use super::create_container::ready_machine;
use crate::container::{Container, State, supervise};
use crate::cri::error::Error;
use crate::node::Node;
use crate::sandbox::registry::LookupError;
use crate::sandbox::{Phase, Sandbox};

/// Most time that a container gets to end after SIGKILL: as long as a disk may
/// hold a process in the kernel.
const AFTER_KILL: Duration = Duration::from_secs(30);

pub(super) async fn stop_container(
    node: &Arc<Node>,
    request: StopContainerRequest,
) -> Result<StopContainerResponse, Error> {
    let (sandbox, container) = match node.registry.container(&request.container_id) {
        Err(LookupError::Unknown { .. }) => return Ok(StopContainerResponse {}),
        found => found?,
    };
    let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
    stop(&sandbox, &container, grace).await?;
    Ok(StopContainerResponse {})
}

/// No lock is held while the container takes its time: whoever wants it gone
/// sooner comes in between, and the end is everyone's.
async fn stop(sandbox: &Sandbox, container: &Container, grace: Duration) -> Result<(), Error> {
    let machine = {
        let _verb = container.verb.lock().await;
        if !matches!(container.state(), State::Running) {
            return Ok(());
        }
        let machine = match ready_machine(sandbox) {
            // It has gone, and the container with it.
            Err(_) if sandbox.record().phase != Phase::Ready => return Ok(()),
            found => found?,
        };
        // Asked once: some programs take a second signal for less patience.
        if !grace.is_zero() && !container.asked_to_stop.load(Ordering::Relaxed) {
            let signal = container.record().stop_signal;
            supervise::signal(&machine, &container.id, signal, false).await?;
            container.asked_to_stop.store(true, Ordering::Relaxed);
        }
        machine
    };
    if tokio::time::timeout(grace, container.wait_exited()).await.is_ok() {
        tracing::info!(container = %container.id, "container stopped");
        return Ok(());
    }
    match supervise::signal(&machine, &container.id, libc::SIGKILL, true).await {
        // It is being removed, or is already.
        Err(error) if matches!(error.status.code(), Code::FailedPrecondition | Code::NotFound) => {}
        sent => sent?,
    }
    if tokio::time::timeout(AFTER_KILL, container.wait_exited()).await.is_err() {
        return Err(Error::DeadlineExceeded(format!(
            "container `{}` did not end within {} s of SIGKILL",
            container.id,
            AFTER_KILL.as_secs()
        )));
    }
    tracing::info!(container = %container.id, "container killed");
    Ok(())
}

/// The signal that asks a container to stop: the client's, else the image's,
/// else SIGTERM.
pub(super) fn stop_signal(config: &cri::ContainerConfig, image: Option<&str>) -> Result<i32, Error> {
    let asked = cri::Signal::try_from(config.stop_signal)
        .map_err(|_| Error::InvalidArgument(format!("unknown stop_signal {}", config.stop_signal)))?;
    if asked != cri::Signal::RuntimeDefault {
        let name = asked.as_str_name();
        let name = name.strip_prefix("SIGNAL_").unwrap_or(name);
        return number(name).ok_or_else(|| Error::InvalidArgument(format!("unknown stop_signal {name}")));
    }
    match image {
        None | Some("") => Ok(libc::SIGTERM),
        Some(name) => number(name)
            .ok_or_else(|| Error::InvalidArgument(format!("the image's stop signal `{name}` is unknown"))),
    }
}

/// A signal as CRI counts it; those that it does not have are its default.
pub(super) fn cri_signal(wanted: i32) -> cri::Signal {
    // Some have two names; the first is as good as the other.
    let all = (1..).map_while(|value| cri::Signal::try_from(value).ok());
    all.into_iter()
        .find(|signal| number(signal.as_str_name().trim_start_matches("SIGNAL_")) == Some(wanted))
        .unwrap_or(cri::Signal::RuntimeDefault)
}

/// A signal by name (`SIGQUIT`, `QUIT`, `SIGRTMIN+3`, `SIGRTMINPLUS3`) or number.
fn number(name: &str) -> Option<i32> {
    /// The first real-time signal that the C library leaves to programs.
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    let bare = name.strip_prefix("SIG").unwrap_or(&name);
    let offset = |rest: &str, word: &str, sign: char| -> Option<i32> {
        match rest.strip_prefix(word).or_else(|| rest.strip_prefix(sign)) {
            // Any that is larger is no signal's, and its sum may be no number.
            Some(digits) => digits.parse::<u8>().ok().map(i32::from),
            None => rest.is_empty().then_some(0),
        }
    };
    let number = if let Some(rest) = bare.strip_prefix("RTMIN") {
        RTMIN + offset(rest, "PLUS", '+')?
    } else if let Some(rest) = bare.strip_prefix("RTMAX") {
        RTMAX - offset(rest, "MINUS", '-')?
    } else {
        match bare {
            "CLD" => libc::SIGCHLD,
            "POLL" => libc::SIGIO,
            "IOT" => libc::SIGABRT,
            _ => format!("SIG{bare}").parse::<nix::sys::signal::Signal>().ok()? as i32,
        }
    };
    (1..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::agent::fake::Fake;
    use crate::container::Exit;
    use crate::events::Events;
    use crate::sandbox::tests::{machine, running};

    #[tokio::test]
    async fn a_later_call_with_less_time_does_not_wait_for_an_earlier_one() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Arc::new(Fake::default());
        let agent = fake.serve(folder.path(), Duration::from_secs(20)).await;
        let (sandbox, container) = running(folder.path(), "p", Events::default());
        sandbox.set_machine(Some(machine(agent)));

        let call = |grace| {
            let (sandbox, container) = (sandbox.clone(), container.clone());
            tokio::spawn(async move { stop(&sandbox, &container, Duration::from_secs(grace)).await })
        };
        let patient = call(600);
        fake.signals(1).await;
        let again = call(500);
        // A removal would find the lock free.
        drop(tokio::time::timeout(Duration::from_secs(20), container.verb.lock()).await.unwrap());
        let at_once = call(0);
        let signals = tokio::time::timeout(Duration::from_secs(20), fake.signals(2)).await.unwrap();
        assert_eq!(signals, [(String::new(), 15), (String::new(), 9)], "it is asked once");
        assert!(!patient.is_finished() && !at_once.is_finished());

        sandbox.container_ended(&container, Exit::reported(137, false, 1));
        for call in [patient, again, at_once] {
            tokio::time::timeout(Duration::from_secs(20), call).await.unwrap().unwrap().unwrap();
        }
        assert_eq!(fake.signals(0).await.len(), 2);
    }

    #[test]
    fn signals_have_many_names() {
        for (name, want) in [
            ("SIGQUIT", Some(3)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMINPLUS3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGCLD", Some(17)),
            ("SIGRTMIN+99", None),
            ("RTMIN+2147483647", None),
            ("RTMIN+-3", None),
            ("RTMAX--2147483648", None),
            ("SIGRTMINx", None),
            ("99", None),
            ("0", None),
            ("SIGNOTHING", None),
        ] {
            assert_eq!(number(name), want, "{name}");
        }
    }

    #[test]
    fn every_signal_of_the_interface_has_a_number() {
        for value in 1..=65 {
            let signal = cri::Signal::try_from(value).unwrap();
            let config = cri::ContainerConfig { stop_signal: value, ..Default::default() };
            let number = stop_signal(&config, None).unwrap();
            assert_eq!(
                super::number(&cri_signal(number).as_str_name()[7..]),
                Some(number),
                "{}",
                signal.as_str_name()
            );
        }
        assert_eq!(cri_signal(3), cri::Signal::Sigquit);
        assert_eq!(cri_signal(32), cri::Signal::RuntimeDefault);
        assert_eq!(stop_signal(&cri::ContainerConfig::default(), Some("SIGINT")).unwrap(), 2);
        assert_eq!(stop_signal(&cri::ContainerConfig::default(), None).unwrap(), 15);
    }
}
