//! `husk pods`: a table of the pods on this node.

use std::time::{Duration, SystemTime};

use husk_config::Config;
use husk_proto::cri;

use super::client;

/// Lists the pods of this node.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print ids only.
    #[arg(long, short)]
    quiet: bool,
}

/// Prints the table.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::connect(&config.socket).await?;
    let mut pods = client::pods(&mut client).await?;
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    if arguments.quiet {
        pods.iter().for_each(|pod| println!("{}", pod.id));
    } else {
        let mut rows = Vec::new();
        for pod in &pods {
            let unreached = pod.state() == cri::PodSandboxState::SandboxReady
                && client::status(&mut client, &pod.id)
                    .await
                    .is_ok_and(|status| client::unreached(&status).is_some());
            rows.push(row(pod, unreached));
        }
        print!("{}", table(["POD ID", "NAMESPACE", "NAME", "STATE", "AGE", "HANDLER"], &rows));
    }
    Ok(())
}

fn row(pod: &cri::PodSandbox, unreached: bool) -> [String; 6] {
    let metadata = pod.metadata.clone().unwrap_or_default();
    [
        pod.id.get(..13).unwrap_or(&pod.id).to_owned(),
        metadata.namespace,
        metadata.name,
        if unreached { "unreached".to_owned() } else { state(pod.state()).to_owned() },
        age(pod.created_at),
        pod.runtime_handler.clone(),
    ]
}

/// The name of a state.
pub fn state(state: cri::PodSandboxState) -> &'static str {
    match state {
        cri::PodSandboxState::SandboxReady => "ready",
        cri::PodSandboxState::SandboxNotready => "not ready",
    }
}

/// The time since `created_at`, nanoseconds since 1970, in its largest unit.
pub fn age(created_at: i64) -> String {
    let created =
        SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(created_at).unwrap_or_default());
    let seconds = created.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// A table whose columns are as wide as their widest cell.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let head = head.map(str::to_owned);
    let mut text = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let in_column = std::iter::once(&head).chain(rows).filter_map(|row| row.get(column));
            let width = in_column.map(|cell| cell.chars().count()).max().unwrap_or_default();
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_does_not_answer_is_no_ready_one() {
        let [.., state, _, _] = row(&cri::PodSandbox::default(), true);
        assert_eq!(state, "unreached");
        let [.., state, _, _] = row(&cri::PodSandbox::default(), false);
        assert_eq!(state, "ready");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["abc".to_owned(), "x".to_owned()], ["d".to_owned(), "yyy".to_owned()]];
        assert_eq!(table(["ID", "LONG NAME"], &rows), "ID   LONG NAME\nabc  x\nd    yyy\n");
    }

    #[test]
    fn ages_are_in_their_largest_unit() {
        let ago = |seconds| {
            let then = SystemTime::now() - Duration::from_secs(seconds);
            let nanos = then.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
            age(i64::try_from(nanos).unwrap_or_default())
        };
        assert_eq!([ago(30), ago(90), ago(7200), ago(200_000)], ["30s", "1m", "2h", "2d"]);
    }
}
