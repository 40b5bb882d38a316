//! `husk version`: the versions of husk and of the huskd that runs.

use husk_config::Config;
use husk_proto::cri;

use super::client;

/// Prints both versions.
pub async fn run(config: &Config) {
    println!("husk   {}", env!("CARGO_PKG_VERSION"));
    let huskd = async {
        let mut client = client::connect(&config.socket).await?;
        let answer = client.version(cri::VersionRequest::default()).await.map_err(client::said)?;
        anyhow::Ok(answer.into_inner())
    };
    match huskd.await {
        Ok(version) => println!("huskd  {} (CRI {})", version.runtime_version, version.runtime_api_version),
        Err(error) => println!("huskd  {error}"),
    }
}
