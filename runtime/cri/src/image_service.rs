//! The ImageService: its RPCs are short, because `husk_image` does the work.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use husk_base::now;
use husk_image::{Credentials, Image, ImageStore, full_name, is_at};
use husk_pods::Error;
use husk_proto::cri::image_service_server::ImageService;
use husk_proto::cri::{
    AuthConfig, FilesystemIdentifier, FilesystemUsage, Image as CriImage, ImageFsInfoRequest,
    ImageFsInfoResponse, ImageSpec, ImageStatusRequest, ImageStatusResponse, Int64Value, ListImagesRequest,
    ListImagesResponse, PullImageRequest, PullImageResponse, RemoveImageRequest, RemoveImageResponse,
    StreamImagesRequest, StreamImagesResponse, UInt64Value,
};
use tonic::{Request, Response, Status};
use tracing::Instrument;

use crate::batches::in_batches;
use crate::status;

/// The ImageService of one node.
#[derive(Debug)]
pub struct Images {
    store: Arc<ImageStore>,
    pinned: Vec<String>,
    trim: fn(),
}

impl Images {
    /// Serves the images of `store`; `pinned` are tags or digests of those that
    /// clients are asked to keep; `trim` is called after each pull.
    #[must_use]
    pub fn new(store: Arc<ImageStore>, pinned: &[String], trim: fn()) -> Self {
        // As images are listed: by whole names, or by an id, which looks like a short name.
        let pinned = pinned.iter().flat_map(|name| [Some(name.clone()), full_name(name)]).flatten();
        Self { store, pinned: pinned.collect(), trim }
    }

    fn to_cri(&self, image: &Image) -> CriImage {
        let names = image.repo_tags.iter().chain(&image.repo_digests).map(String::as_str);
        let is_pinned = |name: &str| self.pinned.iter().any(|pinned| pinned == name);
        CriImage { pinned: names.chain([&*image.id]).any(is_pinned), ..to_cri(image) }
    }

    async fn list(&self, wanted: String) -> Result<Vec<CriImage>, Error> {
        let images = self.store.beside(move |store| {
            if wanted.is_empty() { store.list() } else { Ok(store.resolve(&wanted)?.into_iter().collect()) }
        });
        Ok(images.await?.iter().map(|image| self.to_cri(image)).collect())
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let filter = request.into_inner().filter;
        let wanted = filter.and_then(|filter| filter.image).map(|image| image.image).unwrap_or_default();
        Ok(Response::new(ListImagesResponse { images: self.list(wanted).await.map_err(refused)? }))
    }

    /// An image that is not here is no error: the answer has none then.
    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let name = named(request.image).map_err(refused)?;
        let image = self.store.beside(move |store| store.resolve(&name)).await;
        let image = image.map_err(|error| refused(error.into()))?;
        let info = match &image {
            Some(image) if request.verbose => verbose(image),
            _ => HashMap::new(),
        };
        Ok(Response::new(ImageStatusResponse { image: image.as_ref().map(|image| self.to_cri(image)), info }))
    }

    /// Pulls on when the client does not wait: the next client that asks waits less.
    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        let request = request.into_inner();
        let name = named(request.image).map_err(refused)?;
        let auth = credentials(&name, request.auth).map_err(refused)?;
        let (store, trim) = (self.store.clone(), self.trim);
        let pull = async move {
            let pulled = store.pull(&name, auth).await;
            trim();
            pulled
        };
        let pull = tokio::spawn(pull.in_current_span());
        let pulled = pull.await.map_err(|error| refused(Error::Broken(error.to_string())))?;
        Ok(Response::new(PullImageResponse { image_ref: pulled.map_err(|error| refused(error.into()))? }))
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        let name = named(request.into_inner().image).map_err(refused)?;
        let removed = self.store.beside(move |store| store.remove(&name)).await;
        removed.map_err(|error| refused(error.into()))?;
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        let info = self.store.beside(ImageStore::fs_info).await;
        let usage = FilesystemUsage {
            timestamp: now(),
            fs_id: Some(FilesystemIdentifier { mountpoint: info.directory.display().to_string() }),
            used_bytes: Some(UInt64Value { value: info.used_bytes }),
            inodes_used: Some(UInt64Value { value: info.inodes }),
        };
        Ok(Response::new(ImageFsInfoResponse {
            image_filesystems: vec![usage.clone()],
            container_filesystems: vec![usage],
        }))
    }

    type StreamImagesStream = Pin<Box<dyn Stream<Item = Result<StreamImagesResponse, Status>> + Send>>;

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let filter = request.into_inner().filter;
        let wanted = filter.and_then(|filter| filter.image).map(|image| image.image).unwrap_or_default();
        in_batches(self.list(wanted).await, |images| StreamImagesResponse { images })
    }
}

fn refused(error: Error) -> Status {
    status::of(&error)
}

fn named(image: Option<ImageSpec>) -> Result<String, Error> {
    let name = image.map(|image| image.image).unwrap_or_default();
    if name.is_empty() { Err(Error::Invalid("the request names no image".into())) } else { Ok(name) }
}

/// The credentials of the client for the registry of `image`: none, when the client
/// gives them for another.
fn credentials(image: &str, auth: Option<AuthConfig>) -> Result<Credentials, Error> {
    use base64::Engine;
    let Some(auth) = auth else { return Ok(Credentials::Anonymous) };
    if !auth.server_address.is_empty() && !is_at(image, &auth.server_address) {
        let server = auth.server_address;
        tracing::warn!(
            image,
            server,
            "pull without credentials: those of the request are for another server"
        );
        return Ok(Credentials::Anonymous);
    }
    if !auth.username.is_empty() {
        return Ok(Credentials::Basic(auth.username, auth.password));
    }
    if !auth.auth.is_empty() {
        let wrong = || Error::Invalid("`auth` is not base64 of `user:password`".into());
        let bytes = base64::engine::general_purpose::STANDARD.decode(auth.auth).map_err(|_| wrong())?;
        let text = String::from_utf8(bytes).map_err(|_| wrong())?;
        let (user, password) = text.split_once(':').ok_or_else(wrong)?;
        return Ok(Credentials::Basic(user.into(), password.trim_end_matches('\0').into()));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Credentials::Bearer(auth.registry_token));
    }
    if !auth.identity_token.is_empty() {
        return Err(Error::Unsupported("pull with an identity token is not supported yet".into()));
    }
    Ok(Credentials::Anonymous)
}

fn to_cri(image: &Image) -> CriImage {
    let user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<i64>() {
        Ok(value) => (Some(Int64Value { value }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    CriImage {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: Some(ImageSpec {
            image: image.id.to_string(),
            annotations: image.annotations.clone().into_iter().collect(),
            ..Default::default()
        }),
        pinned: false,
    }
}

fn verbose(image: &Image) -> HashMap<String, String> {
    let info = serde_json::json!({ "imageSpec": image.config.as_ref(), "rootfs": image.rootfs });
    HashMap::from([("info".to_owned(), info.to_string())])
}

#[cfg(test)]
mod tests {
    use husk_image::ImageConfig;

    use super::*;

    fn image() -> Image {
        Image {
            id: "sha256:11".into(),
            repo_tags: vec!["docker.io/library/pause:3".into()],
            repo_digests: Vec::new(),
            size: 1,
            annotations: [("org.opencontainers.image.version".to_owned(), "3".to_owned())].into(),
            config: Arc::default(),
            rootfs: "/x".into(),
        }
    }

    #[test]
    fn an_image_is_pinned_by_any_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(ImageStore::open(folder.path(), ImageConfig::default()).unwrap());
        for (name, want) in [
            ("docker.io/library/pause:3", true),
            ("pause:3", true),
            ("sha256:11", true),
            ("pause:4", false),
            ("pause", false),
        ] {
            let images = Images::new(store.clone(), &[name.to_owned()], || {});
            assert_eq!(images.to_cri(&image()).pinned, want, "{name}");
        }
    }

    #[test]
    fn an_images_annotations_are_told() {
        let spec = to_cri(&image()).spec.unwrap();
        assert_eq!(spec.annotations.get("org.opencontainers.image.version").map(String::as_str), Some("3"));
    }

    #[test]
    fn credentials_are_for_their_server_alone() {
        let to = |server: &str| {
            let auth = AuthConfig {
                username: "u".into(),
                password: "p".into(),
                server_address: server.into(),
                ..Default::default()
            };
            credentials("registry.example/app:1", Some(auth)).unwrap()
        };
        let known = Credentials::Basic("u".into(), "p".into());
        assert_eq!(to(""), known);
        assert_eq!(to("https://registry.example/v2/"), known);
        assert_eq!(to("other.example"), Credentials::Anonymous);
    }
}
