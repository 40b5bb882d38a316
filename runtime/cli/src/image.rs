//! Images, as far as containers need them.

use anyhow::Context;
use husk_proto::cri;

use crate::client::{Images, said};
use crate::spec::Port;

/// An image with the verbose part; nothing for one that huskd does not have.
///
/// # Errors
/// huskd's.
pub async fn status(images: &mut Images, name: &str) -> anyhow::Result<Option<cri::ImageStatusResponse>> {
    let image = cri::ImageSpec { image: name.to_owned(), ..Default::default() };
    let request = cri::ImageStatusRequest { image: Some(image), verbose: true };
    let answer = images.image_status(request).await.map_err(said)?.into_inner();
    Ok(answer.image.is_some().then_some(answer))
}

/// Mappings from free ports of the host to all ports that an image exposes.
///
/// # Errors
/// A port that makes no sense, and no free port.
pub fn published(image: &cri::ImageStatusResponse) -> anyhow::Result<Vec<cri::PortMapping>> {
    let mut mappings = Vec::new();
    for port in exposed(image) {
        mappings.extend(Port::exposed(&port).and_then(|port| port.mappings()).context("-P")?);
    }
    Ok(mappings)
}

/// The ports that an image exposes, as `80/tcp`.
fn exposed(image: &cri::ImageStatusResponse) -> Vec<String> {
    let info = image.info.get("info").and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    let ports = info.as_ref().and_then(|info| info.pointer("/imageSpec/config/ExposedPorts")?.as_object());
    ports.map(|ports| ports.keys().cloned().collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_that_an_image_exposes_gets_one_of_the_host() {
        let image = |info: &str| cri::ImageStatusResponse {
            info: [("info".to_owned(), info.to_owned())].into(),
            ..Default::default()
        };
        let two = image(r#"{"imageSpec":{"config":{"ExposedPorts":{"53/udp":{},"80/tcp":{}}}}}"#);
        let mappings = published(&two).unwrap();
        assert_eq!(mappings.iter().map(|mapping| mapping.container_port).collect::<Vec<_>>(), [53, 80]);
        assert!(mappings.iter().all(|mapping| mapping.host_port > 0));
        assert_eq!(published(&image("{}")).unwrap(), Vec::new());
        assert!(published(&image(r#"{"imageSpec":{"config":{"ExposedPorts":{"x":{}}}}}"#)).is_err());
    }
}
