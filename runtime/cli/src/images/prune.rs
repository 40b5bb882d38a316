//! `husk image prune`: removes images that nothing needs.

use std::io::{BufRead, IsTerminal};

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri;

use super::text;
use crate::client;

/// Removes images that have no tag any more and that no container uses.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk image prune --all --force")]
pub struct Arguments {
    /// Remove images with tags, too, if no container uses them. Pinned images stay.
    #[arg(long, short)]
    all: bool,
    /// Do not ask first.
    #[arg(long, short)]
    force: bool,
}

/// Removes them and says how much that frees at most.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::images(&config.socket).await?;
    let used = super::used(config).await?;
    let images = super::all(&mut client).await?;
    let unneeded: Vec<_> = images
        .into_iter()
        .filter(|image| is_candidate(image, arguments.all) && !super::is_used(image, &used))
        .collect();
    if !unneeded.is_empty() && !arguments.force && !agreed(unneeded.len())? {
        return Ok(());
    }
    let mut freed = 0_u64;
    for image in &unneeded {
        super::remove_one(&mut client, &image.id).await?;
        println!("deleted: {}", image.id);
        freed = freed.saturating_add(image.size);
    }
    println!("reclaimed: {}", text::size(freed));
    Ok(())
}

fn is_candidate(image: &cri::Image, all: bool) -> bool {
    !image.pinned && (all || image.repo_tags.is_empty())
}

fn agreed(images: usize) -> anyhow::Result<bool> {
    let input = std::io::stdin();
    if !input.is_terminal() {
        bail!("{images} images would be removed: use --force where nobody can be asked");
    }
    eprint!("{images} images will be removed. Continue? [y/N] ");
    let mut answer = String::new();
    input.lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_and_pins_keep_an_image() {
        let image = |tags: &[&str], pinned| cri::Image {
            repo_tags: tags.iter().map(|&tag| tag.to_owned()).collect(),
            pinned,
            ..Default::default()
        };
        assert!(is_candidate(&image(&[], false), false));
        assert!(!is_candidate(&image(&["a:1"], false), false));
        assert!(is_candidate(&image(&["a:1"], false), true));
        assert!(!is_candidate(&image(&[], true), true));
    }
}
