//! Verbs of images: `husk images`, `husk pull`, `husk rmi`, `husk image …` and `husk system df`.

use std::collections::HashSet;

use anyhow::bail;
use husk_config::Config;
use husk_proto::cri;

use crate::client::{self, Images, said};
use crate::find;

pub mod df;
pub mod history;
pub mod inspect;
pub mod list;
pub mod prune;
pub mod pull;
pub mod remove;
mod text;

/// Inspects and prunes images.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    #[command(visible_alias = "list")]
    Ls(list::Arguments),
    Pull(pull::Arguments),
    #[command(visible_alias = "remove")]
    Rm(remove::Arguments),
    Inspect(inspect::Arguments),
    History(history::Arguments),
    Prune(prune::Arguments),
}

/// Runs `husk image …`.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    match &arguments.command {
        Command::Ls(list) => list::run(list, config).await,
        Command::Pull(pull) => pull::run(pull, config).await,
        Command::Rm(remove) => remove::run(remove, config).await,
        Command::Inspect(inspect) => inspect::run(inspect, config).await,
        Command::History(history) => history::run(history, config).await,
        Command::Prune(prune) => prune::run(prune, config).await,
    }
}

/// All images, those with the first names first.
async fn all(client: &mut Images) -> anyhow::Result<Vec<cri::Image>> {
    let answer = client.list_images(cri::ListImagesRequest::default()).await.map_err(said)?;
    let mut images = answer.into_inner().images;
    images.sort_by(|one, other| (&one.repo_tags, &one.id).cmp(&(&other.repo_tags, &other.id)));
    Ok(images)
}

/// One image by a name or an id, and what its configuration says; none, if it is not here.
pub async fn status(
    client: &mut Images,
    name: &str,
) -> anyhow::Result<Option<(cri::Image, serde_json::Value)>> {
    let image = Some(cri::ImageSpec { image: name.to_owned(), ..Default::default() });
    let request = cri::ImageStatusRequest { image, verbose: true };
    let answer = client.image_status(request).await.map_err(said)?.into_inner();
    let info = client::info(&answer.info);
    Ok(answer.image.map(|image| (image, info)))
}

/// The same of an image that has to be here.
async fn one(client: &mut Images, name: &str) -> anyhow::Result<(cri::Image, serde_json::Value)> {
    match status(client, name).await? {
        Some(found) => Ok(found),
        None => bail!("there is no image {name}: `husk images` lists them"),
    }
}

async fn remove_one(client: &mut Images, id: &str) -> anyhow::Result<()> {
    let image = Some(cri::ImageSpec { image: id.to_owned(), ..Default::default() });
    client.remove_image(cri::RemoveImageRequest { image }).await.map_err(said)?;
    Ok(())
}

/// The ids and references of images that containers use, also of those that have ended.
async fn used(config: &Config) -> anyhow::Result<HashSet<String>> {
    let mut client = client::connect(&config.socket).await?;
    Ok(used_by(find::containers(&mut client).await?))
}

/// The same for these containers.
fn used_by(containers: Vec<cri::Container>) -> HashSet<String> {
    containers.into_iter().flat_map(names_used).collect()
}

fn names_used(container: cri::Container) -> Vec<String> {
    let named = container.image.map(|image| image.image).unwrap_or_default();
    let names = [container.image_id, container.image_ref, named];
    names.into_iter().filter(|name| !name.is_empty()).collect()
}

fn is_used(image: &cri::Image, used: &HashSet<String>) -> bool {
    std::iter::once(&image.id)
        .chain(&image.repo_digests)
        .chain(&image.repo_tags)
        .any(|name| used.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_used_by_its_id_its_digest_or_its_tag() {
        let image = cri::Image {
            id: "sha256:1".into(),
            repo_tags: vec!["r/a:1".into()],
            repo_digests: vec!["r/a@sha256:2".into()],
            ..Default::default()
        };
        let by = |container| is_used(&image, &names_used(container).into_iter().collect());
        let container = cri::Container::default;
        assert!(by(cri::Container { image_id: "sha256:1".into(), ..container() }));
        assert!(by(cri::Container { image_ref: "r/a@sha256:2".into(), ..container() }));
        let named = cri::ImageSpec { image: "r/a:1".into(), ..Default::default() };
        assert!(by(cri::Container { image: Some(named), ..container() }));
        assert!(!by(cri::Container { image_id: "sha256:3".into(), ..container() }));
        let nameless = cri::Image { id: "sha256:4".into(), ..Default::default() };
        assert!(!is_used(&nameless, &names_used(container()).into_iter().collect()));
    }
}
