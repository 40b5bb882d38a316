//! The end of a container, waited for.

use std::time::Duration;

use husk_proto::cri;

use crate::client::{self, Client};

/// The first and the longest time between two looks.
const LOOKS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// How many times in a row huskd may not answer, as when it is started again.
const UNANSWERED: u32 = 60;

/// The exit code of a container once it has ended, as a process can have it.
///
/// # Errors
/// As for [`wait`].
pub async fn code(client: &mut Client, id: &str) -> anyhow::Result<u8> {
    Ok(u8::try_from(wait(client, id).await?.exit_code).unwrap_or(u8::MAX))
}

/// Waits until a container has ended, however long that takes.
///
/// # Errors
/// A container that is removed before, and a huskd that stays away.
pub async fn wait(client: &mut Client, id: &str) -> anyhow::Result<cri::ContainerStatus> {
    let (mut pause, longest) = LOOKS;
    let mut unanswered = 0;
    loop {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        match client.container_status(request).await {
            Ok(answer) => {
                let status = answer.into_inner().status.unwrap_or_default();
                if status.state() == cri::ContainerState::ContainerExited {
                    return Ok(status);
                }
                unanswered = 0;
            }
            Err(status) if status.code() == tonic::Code::Unavailable && unanswered < UNANSWERED => {
                unanswered += 1;
            }
            Err(status) => return Err(client::said(status)),
        }
        tokio::time::sleep(pause).await;
        pause = longest.min(pause * 2);
    }
}
