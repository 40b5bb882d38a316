//! `husk system df`: the space that images and containers take.

use husk_config::Config;
use husk_proto::cri;

use super::text;
use crate::client::{self, said};
use crate::find;
use crate::output::table;

/// Shows the space that images and containers take.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Shows the space that images and the writable layers of containers take.
    Df,
}

/// Runs `husk system …`.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let Command::Df = arguments.command;
    let mut images = client::images(&config.socket).await?;
    let all = super::all(&mut images).await?;
    let info = images.image_fs_info(cri::ImageFsInfoRequest::default()).await.map_err(said)?.into_inner();
    let taken = info.image_filesystems.iter().filter_map(|usage| usage.used_bytes.as_ref());
    let taken = taken.map(|bytes| bytes.value).fold(0, u64::saturating_add);
    let mut client = client::connect(&config.socket).await?;
    let containers = find::containers(&mut client).await?;
    let of_containers = containers.len();
    let running =
        containers.iter().filter(|one| one.state() == cri::ContainerState::ContainerRunning).count();
    let used = super::used_by(containers);
    let (active, idle): (Vec<_>, Vec<_>) = all.iter().partition(|image| super::is_used(image, &used));
    let idle = idle.iter().filter(|image| !image.pinned).map(|image| image.size).fold(0, u64::saturating_add);

    let stats = client.list_container_stats(cri::ListContainerStatsRequest::default()).await.map_err(said)?;
    let written = stats.into_inner().stats.into_iter().filter_map(|one| one.writable_layer?.used_bytes);
    let written = written.map(|bytes| bytes.value).fold(0, u64::saturating_add);

    let row = |what: &str, total: usize, active: usize, size: u64, idle: u64| {
        [what.to_owned(), total.to_string(), active.to_string(), text::size(size), text::size(idle)]
    };
    let rows = [
        row("images", all.len(), active.len(), taken, idle),
        row("containers", of_containers, running, written, 0),
    ];
    print!("{}", table(&["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"], &rows));
    Ok(())
}
