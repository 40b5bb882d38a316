//! `husk images`: a line for each name of an image.

use husk_config::Config;
use husk_proto::cri;
use serde_json::json;

use super::text;
use crate::client;
use crate::output::table;

/// Lists the images of this node.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  husk images\n  husk images --digests nginx\n  husk rmi $(husk images -q)"
)]
pub struct Arguments {
    /// Only this image: a name, an id, or the beginning of an id.
    image: Option<String>,
    /// Print ids only.
    #[arg(long, short)]
    quiet: bool,
    /// Show the digest that each name had when it was pulled.
    #[arg(long)]
    digests: bool,
    /// Print whole ids.
    #[arg(long)]
    no_trunc: bool,
    /// The form of the output.
    #[arg(long, short, value_parser = ["table", "json"], default_value = "table")]
    output: String,
}

/// Prints the list.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::images(&config.socket).await?;
    let images = match &arguments.image {
        Some(name) => vec![super::one(&mut client, name).await?.0],
        None => super::all(&mut client).await?,
    };
    if arguments.quiet {
        images.iter().for_each(|image| println!("{}", id(image, arguments.no_trunc)));
    } else if arguments.output == "json" {
        let images: Vec<_> = images.iter().map(as_json).collect();
        println!("{}", serde_json::to_string_pretty(&images)?);
    } else if arguments.digests {
        let rows: Vec<_> = images.iter().flat_map(|image| rows(image, arguments.no_trunc)).collect();
        print!("{}", table(&["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "SIZE"], &rows));
    } else {
        let rows: Vec<_> = images.iter().flat_map(|image| rows(image, arguments.no_trunc)).collect();
        let rows: Vec<_> = rows.into_iter().map(|[name, tag, _, id, size]| [name, tag, id, size]).collect();
        print!("{}", table(&["REPOSITORY", "TAG", "IMAGE ID", "SIZE"], &rows));
    }
    Ok(())
}

/// The fields of an image, for programs.
pub fn as_json(image: &cri::Image) -> serde_json::Value {
    json!({
        "ID": image.id,
        "RepoTags": image.repo_tags,
        "RepoDigests": image.repo_digests,
        "Size": image.size,
        "Pinned": image.pinned,
    })
}

fn id(image: &cri::Image, whole: bool) -> &str {
    if whole { &image.id } else { text::short(&image.id) }
}

/// A row for each tag; for an image without one, a row for each digest.
fn rows(image: &cri::Image, whole: bool) -> Vec<[String; 5]> {
    let row = |repository: &str, tag: &str, digest: &str| {
        [repository, tag, digest, id(image, whole), &text::size(image.size)].map(str::to_owned)
    };
    let digests: Vec<_> = image.repo_digests.iter().map(|name| text::split(name)).collect();
    let mut rows = Vec::new();
    for name in &image.repo_tags {
        let (repository, tag) = text::split(name);
        let digest = digests.iter().find(|(of, _)| *of == repository);
        rows.push(row(repository, tag, digest.map_or("<none>", |(_, digest)| digest)));
    }
    if rows.is_empty() {
        rows.extend(digests.iter().map(|(repository, digest)| row(repository, "<none>", digest)));
    }
    if rows.is_empty() {
        rows.push(row("<none>", "<none>", "<none>"));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tag_has_a_row_and_an_image_without_tags_is_shown() {
        let mut image = cri::Image {
            id: format!("sha256:{}", "1a".repeat(32)),
            repo_tags: vec!["r:5000/a:1".into(), "b:2".into()],
            repo_digests: vec!["r:5000/a@sha256:22".into()],
            size: 1500,
            ..Default::default()
        };
        let shown =
            |image: &cri::Image| rows(image, false).iter().map(|row| row.join(" ")).collect::<Vec<_>>();
        assert_eq!(
            shown(&image),
            ["r:5000/a 1 sha256:22 1a1a1a1a1a1a 1.50kB", "b 2 <none> 1a1a1a1a1a1a 1.50kB"]
        );
        image.repo_tags.clear();
        assert_eq!(shown(&image), ["r:5000/a <none> sha256:22 1a1a1a1a1a1a 1.50kB"]);
        image.repo_digests.clear();
        assert_eq!(shown(&image), ["<none> <none> <none> 1a1a1a1a1a1a 1.50kB"]);
    }
}
