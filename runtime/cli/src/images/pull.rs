//! `husk pull`: fetches images, with the credentials of `husk login` or `docker login`.

use std::time::Duration;

use husk_config::Config;
use husk_proto::cri;

use crate::client::{self, said};
use crate::credentials;

/// Time for what comes after the pull itself, or before it while others are pulled.
const BESIDES: Duration = Duration::from_secs(60);

/// Pulls images from their registries.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  husk pull debian\n  husk pull registry.example:5000/team/app:1.2")]
pub struct Arguments {
    /// Names as docker takes them: debian, debian:12, registry.example/app@sha256:….
    #[arg(required = true)]
    images: Vec<String>,
    /// Print only the references of the images.
    #[arg(long, short)]
    quiet: bool,
    /// Use no credentials.
    #[arg(long)]
    anonymous: bool,
}

/// Pulls one image after the other.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let limit = Duration::from_secs(config.images.pull_timeout_seconds).saturating_add(BESIDES);
    let mut client = client::images_within(&config.socket, limit).await?;
    for image in &arguments.images {
        let auth = match arguments.anonymous {
            true => None,
            false => credentials::of_image(image).await?,
        };
        if !arguments.quiet {
            eprintln!("pulling {image}{}", if auth.is_some() { " with credentials" } else { "" });
        }
        let spec = Some(cri::ImageSpec { image: image.clone(), ..Default::default() });
        let request = cri::PullImageRequest { image: spec, auth, sandbox_config: None };
        let answer = client.pull_image(request).await.map_err(said)?;
        println!("{}", answer.into_inner().image_ref);
    }
    Ok(())
}
