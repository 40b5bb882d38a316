//! The directories that an image declares as volumes (OCI image-spec,
//! `config.md`, `Volumes`). Each becomes a directory of the container's own, unless its
//! client mounts something there. The directory can be written where the root file system
//! cannot, and is no overlay, on which databases are slow.

use std::path::{Path, PathBuf};

use husk_proto::cri;
use husk_volumes as volumes;
use oci_spec::image::Config as ImageConfig;

use super::Error;

/// How many volumes one image may declare.
const MAX: usize = 128;

/// The declared paths in the container, in the order of their names.
pub(super) fn wanted(image: &ImageConfig, asked: &[cri::Mount]) -> Result<Vec<PathBuf>, Error> {
    let declared = image.volumes().as_deref().unwrap_or_default();
    if declared.len() > MAX {
        return Err(Error::Invalid(format!(
            "the image declares {} volumes, and a container has at most {MAX}: build it with fewer",
            declared.len()
        )));
    }
    let place = |path: &str| volumes::clean(&format!("/{path}"));
    let taken: Vec<_> = asked.iter().filter_map(|mount| place(&mount.container_path)).collect();
    let mut wanted: Vec<_> = declared.iter().filter_map(|path| place(path)).collect();
    wanted.retain(|path| path != Path::new("/") && !taken.contains(path));
    wanted.sort();
    wanted.dedup();
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use oci_spec::image::ConfigBuilder;

    use super::*;

    fn image(volumes: &[String]) -> ImageConfig {
        ConfigBuilder::default().volumes(volumes.to_vec()).build().unwrap()
    }

    #[test]
    fn an_image_has_its_directories_unless_the_client_mounts_there() {
        let volumes = ["/data", "relative", "/srv/../db/", "/db", "/", "/logs"].map(str::to_owned);
        let asked = cri::Mount { container_path: "/logs/".into(), ..Default::default() };
        let got = wanted(&image(&volumes), &[asked]).unwrap();
        assert_eq!(got, ["/data", "/db", "/relative"].map(PathBuf::from));
        assert!(wanted(&ImageConfig::default(), &[]).unwrap().is_empty());
    }

    #[test]
    fn an_image_with_far_too_many_is_refused() {
        let many: Vec<_> = (0..=MAX).map(|number| format!("/{number}")).collect();
        assert!(wanted(&image(&many), &[]).unwrap_err().to_string().contains("129 volumes"));
    }
}
