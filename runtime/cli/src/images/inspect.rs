//! `husk image inspect`: what an image's configuration says, as JSON.

use husk_config::Config;
use serde_json::Value;

use super::list::as_json;
use crate::client;

/// Prints images and their configurations, as JSON.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  husk image inspect debian:12")]
pub struct Arguments {
    /// Names, ids, or beginnings of ids.
    #[arg(required = true)]
    images: Vec<String>,
}

/// Prints an array with an object for each image.
pub async fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    let mut client = client::images(&config.socket).await?;
    let mut shown = Vec::new();
    for name in &arguments.images {
        let (image, info) = super::one(&mut client, name).await?;
        let mut object = as_json(&image);
        let spec = info.get("imageSpec");
        let field = |name: &str| spec.and_then(|spec| spec.get(name)).cloned().unwrap_or(Value::Null);
        object["Architecture"] = field("architecture");
        object["Os"] = field("os");
        object["Created"] = field("created");
        object["Config"] = field("config");
        object["RootFS"] = field("rootfs");
        shown.push(object);
    }
    println!("{}", serde_json::to_string_pretty(&shown)?);
    Ok(())
}
