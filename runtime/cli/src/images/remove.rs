//! `husk rmi`: removes images.

use anyhow::bail;
use husk_config::Config;

use crate::client;

/// Removes images, each with all of its names.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk rmi debian:12 3f57d9401f8d")]
pub struct Arguments {
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    images: Vec<String>,
    /// Remove images that containers use, too (they keep it until they are removed), and say nothing of images that
    /// are not here.
    #[arg(long, short)]
    force: bool,
}

/// Removes one image after the other; an image that stays does not keep the others.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::images(&config.socket).await?;
    let used = if arguments.force { Default::default() } else { super::used(config).await? };
    let mut stay = 0;
    for name in &arguments.images {
        let removed = async {
            let found = super::status(&mut client, name).await?;
            if found.is_none() && arguments.force {
                return Ok(());
            }
            let Some((image, _)) = found else { bail!("there is no image {name}: `husk images` lists them") };
            if super::is_used(&image, &used) {
                bail!("{name} is used by a container: remove that first, or use --force");
            }
            super::remove_one(&mut client, &image.id).await?;
            let names = image.repo_tags.iter().chain(&image.repo_digests);
            names.for_each(|name| println!("untagged: {name}"));
            println!("deleted: {}", image.id);
            Ok(())
        };
        if let Err(error) = removed.await {
            eprintln!("husk: {error:#}");
            stay += 1;
        }
    }
    if stay > 0 { bail!("{stay} of {} images were not removed", arguments.images.len()) } else { Ok(()) }
}
