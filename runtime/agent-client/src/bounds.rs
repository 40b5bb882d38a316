//! Limits of an agent's answers. A guest may make them as long as it likes, so that no more
//! than this is kept or passed on.

use husk_proto::agent::*;
use tonic::Status;

/// The largest answer that is read, bytes. The longest true one, the usage of a full
/// pod, has half of that.
pub(super) const MAX_ANSWER: usize = 1 << 20;

/// The longest text for people, such as an error, bytes.
const MAX_TEXT: usize = 4096;

/// The longest name, bytes.
const MAX_NAME: usize = 256;

/// The most supplementary groups in a container's status. The process
/// has all of them, up to the kernel's 65,536.
const MAX_GROUPS: usize = 1024;

/// The most containers whose usage is read: an agent has no more.
const MAX_CONTAINERS: usize = 1024;

/// The most network interfaces whose counters are read.
const MAX_INTERFACES: usize = 256;

/// An answer whose texts and lists can be cut to their limits. Numbers need
/// no limit.
pub trait Bounded {
    /// Cuts texts and lists that are too long.
    fn bound(&mut self) {}
}

impl Bounded for () {}
impl Bounded for ShutdownResponse {}
impl Bounded for StartContainerResponse {}
impl Bounded for RemoveContainerResponse {}
impl Bounded for UpdateContainerResponse {}
impl Bounded for ExecProcessResponse {}
impl Bounded for SignalProcessResponse {}
impl Bounded for ResizeTerminalResponse {}
impl Bounded for WriteVolumeResponse {}

impl Bounded for HelloResponse {
    fn bound(&mut self) {
        cut(&mut self.release, MAX_NAME);
    }
}

impl Bounded for CreateSandboxResponse {
    fn bound(&mut self) {
        cut(&mut self.agent_version, MAX_NAME);
    }
}

impl Bounded for CreateContainerResponse {
    fn bound(&mut self) {
        cut(&mut self.start_error, MAX_TEXT);
        if let Some(identity) = &mut self.identity {
            shorten(&mut identity.groups, MAX_GROUPS);
        }
    }
}

impl Bounded for ContainerStatsResponse {
    fn bound(&mut self) {
        shorten(&mut self.containers, MAX_CONTAINERS);
        for container in &mut self.containers {
            cut(&mut container.container_id, MAX_NAME);
        }
        if let Some(machine) = &mut self.machine {
            shorten(&mut machine.interfaces, MAX_INTERFACES);
            for interface in &mut machine.interfaces {
                cut(&mut interface.name, MAX_NAME);
            }
        }
    }
}

/// An agent's error, cut to the limits.
pub(super) fn status(status: &Status) -> Status {
    let mut message = status.message().to_owned();
    cut(&mut message, MAX_TEXT);
    Status::new(status.code(), message)
}

/// Cuts a text at a character's end, and marks that.
fn cut(text: &mut String, most: usize) {
    const CUT: &str = "…";
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most.saturating_sub(CUT.len())));
        text.push_str(CUT);
        text.shrink_to_fit();
    }
}

fn shorten<T>(list: &mut Vec<T>, most: usize) {
    if list.len() > most {
        list.truncate(most);
        list.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_at_a_characters_end() {
        for (before, most, after) in [
            ("short", 5, "short"),
            ("longer", 5, "lo…"),
            ("éééé", 6, "é…"),
            ("éééé", 8, "éééé"),
            ("xx", 0, "…"),
        ] {
            let mut text = before.to_owned();
            cut(&mut text, most);
            assert_eq!(text, after);
        }
    }

    #[test]
    fn figures_are_of_so_many_things_and_no_more() {
        let long = "x".repeat(MAX_NAME + 1);
        let container = ContainerStat { container_id: long.clone(), ..Default::default() };
        let interface = InterfaceStat { name: long, ..Default::default() };
        let machine = MachineStat { interfaces: vec![interface; MAX_INTERFACES + 1], ..Default::default() };
        let mut answer = ContainerStatsResponse {
            containers: vec![container; MAX_CONTAINERS + 1],
            machine: Some(machine),
        };
        answer.bound();
        let interfaces = answer.machine.unwrap().interfaces;
        assert_eq!((answer.containers.len(), interfaces.len()), (MAX_CONTAINERS, MAX_INTERFACES));
        assert!(answer.containers.iter().all(|container| container.container_id.len() <= MAX_NAME));
        assert!(interfaces.iter().all(|interface| interface.name.len() <= MAX_NAME));
    }
}
