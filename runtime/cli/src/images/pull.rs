//! `husk pull`: fetches images, with the credentials of `husk login` or `docker login`.

use std::time::Duration;

use husk_config::Config;
use husk_proto::cri;

use crate::client::{self, Images, said};
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
    let mut client = connect(config).await?;
    for image in &arguments.images {
        let auth = match arguments.anonymous {
            true => None,
            false => credentials::of_image(image).await?,
        };
        if !arguments.quiet {
            eprintln!("pulling {image}{}", if auth.is_some() { " with credentials" } else { "" });
        }
        println!("{}", pull(&mut client, image, auth).await?);
    }
    Ok(())
}

/// A connection for pulls, which take as long as the configuration allows.
///
/// # Errors
/// huskd does not answer.
pub async fn connect(config: &Config) -> anyhow::Result<Images> {
    let limit = Duration::from_secs(config.images.pull_timeout_seconds).saturating_add(BESIDES);
    client::images_within(&config.socket, limit).await
}

/// Pulls an image, and answers with its reference.
///
/// # Errors
/// huskd's.
pub async fn pull(client: &mut Images, image: &str, auth: Option<cri::AuthConfig>) -> anyhow::Result<String> {
    let spec = Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() });
    let request = cri::PullImageRequest { image: spec, auth, sandbox_config: None };
    Ok(client.pull_image(request).await.map_err(said)?.into_inner().image_ref)
}
