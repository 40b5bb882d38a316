//! Formats the figures for a person.

use std::fmt::Write;

use crate::cri::Step;
use crate::memory::Memory;
use crate::run::{Measurement, PodCost};
use crate::statistics::Spread;

const MIB: f64 = 1024.0 * 1024.0;

/// The budgets of Husk's own parts, bytes.
const VMM_BUDGET: u64 = 5 << 20;
const AGENT_BUDGET: u64 = 6 << 20;
const DAEMON_BUDGET: u64 = 25 << 20;

/// Husk comes first; the others are compared with it.
pub fn render(all: &[Measurement]) -> String {
    let mut text = String::new();
    for measurement in all {
        steps(&mut text, measurement);
        memory(&mut text, measurement);
    }
    if let Some((husk, peers)) = all.split_first() {
        budgets(&mut text, husk);
        for peer in peers {
            comparison(&mut text, husk, peer);
        }
    }
    text
}

fn steps(text: &mut String, measurement: &Measurement) {
    let Measurement { name, version, pods, one_by_one, at_once, .. } = measurement;
    line(text, format_args!("\n{name} ({version}), milliseconds"));
    line(
        text,
        format_args!("{:<18}{:>24}      {:>24}", "", format!("{pods} one by one"), format!("{pods} at once")),
    );
    let heads = format!("{:>8}{:>8}{:>8}", "min", "median", "max");
    line(text, format_args!("{:<18}{heads}      {heads}", ""));
    for step in Step::ALL {
        if let (Some(one), Some(many)) = (one_by_one.steps.get(&step), at_once.steps.get(&step)) {
            row(text, &format!("{step:?}"), *one, *many);
        }
    }
    row(text, "to running", one_by_one.to_running, at_once.to_running);
    row(text, "to gone", one_by_one.to_gone, at_once.to_gone);
    line(
        text,
        format_args!(
            "{:<18}{:>24.0}      {:>24.0}",
            "all running", one_by_one.all_running, at_once.all_running
        ),
    );
}

fn row(text: &mut String, name: &str, one: Spread, many: Spread) {
    let cells = |spread: Spread| format!("{:>8.0}{:>8.0}{:>8.0}", spread.min, spread.median, spread.max);
    line(text, format_args!("{name:<18}{}      {}", cells(one), cells(many)));
}

fn memory(text: &mut String, measurement: &Measurement) {
    let Measurement { name, pods, memory, .. } = measurement;
    line(text, format_args!("\n{name}, MiB of memory: resident (proportional)"));
    let many = format!("each of {pods} pods");
    line(text, format_args!("{:<18}{:>24}      {many:>24}", "", "one idle pod"));
    let pair = |text: &mut String, name: &str, of: &dyn Fn(&PodCost) -> Option<Memory>| {
        if let (Some(one), Some(many)) = (of(&memory.one), of(&memory.each_of_many)) {
            line(text, format_args!("{name:<18}{:>24}      {:>24}", both(one), both(many)));
        }
    };
    pair(text, "VMM's own", &|cost| cost.vmm);
    pair(text, "guest", &|cost| cost.guest);
    pair(text, "whole pod", &|cost| Some(cost.whole));
    if let (Some(one), Some(many)) = (memory.one.agent_resident, memory.each_of_many.agent_resident) {
        line(text, format_args!("{:<18}{:>24.1}      {:>24.1}", "agent, in guest", mib(one), mib(many)));
    }
    let available = memory.available_each_of_many as f64 / MIB;
    line(text, format_args!("{:<18}{:>24}      {available:>24.1}", "host has less by", ""));
    line(
        text,
        format_args!(
            "{:<18}{:>24} before pods, {} after them",
            "daemon",
            both(memory.daemon_before),
            both(memory.daemon_after)
        ),
    );
}

fn budgets(text: &mut String, husk: &Measurement) {
    line(text, format_args!("\nbudgets"));
    let mut check = |name: &str, bytes: Option<u64>, budget: u64| {
        let Some(bytes) = bytes else { return };
        let verdict = if bytes <= budget { "held" } else { "EXCEEDED" };
        line(text, format_args!("{name:<34}{:>6.1} of {:>4.1} MiB  {verdict}", mib(bytes), mib(budget)));
    };
    let one = &husk.memory.one;
    check("husk-vmm's own memory, proportional", one.vmm.map(|memory| memory.proportional), VMM_BUDGET);
    check("husk-agent, resident", one.agent_resident, AGENT_BUDGET);
    check("huskd idle, resident", Some(husk.memory.daemon_before.resident), DAEMON_BUDGET);
}

fn comparison(text: &mut String, husk: &Measurement, peer: &Measurement) {
    line(text, format_args!("\nhusk's part of what {} takes", peer.name));
    let mut ratio = |name: &str, husk: f64, peer: f64| {
        if peer > 0.0 {
            line(text, format_args!("{name:<40}{:>6.2}", husk / peer));
        }
    };
    ratio(
        "to running, one by one, median",
        husk.one_by_one.to_running.median,
        peer.one_by_one.to_running.median,
    );
    ratio("all running, at once", husk.at_once.all_running, peer.at_once.all_running);
    ratio("to gone, one by one, median", husk.one_by_one.to_gone.median, peer.one_by_one.to_gone.median);
    let proportional = |cost: &PodCost| cost.whole.proportional as f64;
    ratio("memory of one idle pod", proportional(&husk.memory.one), proportional(&peer.memory.one));
    ratio(
        "memory of each of many",
        proportional(&husk.memory.each_of_many),
        proportional(&peer.memory.each_of_many),
    );
}

fn both(memory: Memory) -> String {
    format!("{:.1} ({:.1})", mib(memory.resident), mib(memory.proportional))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

/// Writing to a string cannot fail.
fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{arguments}");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use super::*;
    use crate::run::{PodMemory, Steps};

    fn measurement(name: &str, factor: f64, vmm: u64) -> Measurement {
        let spread = Spread { min: factor, median: 2.0 * factor, max: 3.0 * factor };
        let steps = || Steps {
            steps: Step::ALL.into_iter().map(|step| (step, spread)).collect::<BTreeMap<_, _>>(),
            to_running: spread,
            to_gone: spread,
            all_running: factor,
        };
        let memory = Memory { resident: vmm * 2, proportional: vmm };
        let cost = PodCost { vmm: Some(memory), whole: memory, ..Default::default() };
        Measurement {
            name: name.into(),
            version: "1".into(),
            handler: String::new(),
            pods: 10,
            pull_ms: 1.0,
            one_by_one: steps(),
            at_once: steps(),
            memory: PodMemory {
                daemon_before: memory,
                daemon_after: memory,
                one: cost.clone(),
                each_of_many: cost,
                available_each_of_many: -1,
            },
        }
    }

    #[test]
    fn a_budget_that_is_not_held_is_named() {
        let budget = |vmm| render(&[measurement("husk", 1.0, vmm)]);
        let of_vmm = |text: &str| text.lines().find(|line| line.starts_with("husk-vmm")).unwrap().to_owned();
        assert!(of_vmm(&budget(5 << 20)).ends_with("held"));
        assert!(of_vmm(&budget((5 << 20) + 1)).ends_with("EXCEEDED"));
    }

    #[test]
    fn peers_are_compared_with_husk() {
        let text = render(&[measurement("husk", 100.0, 1 << 20), measurement("kata", 400.0, 4 << 20)]);
        let ratio = text.lines().find(|line| line.starts_with("to running, one by one, median")).unwrap();
        assert!(ratio.ends_with("0.25"), "{ratio}");
    }
}
