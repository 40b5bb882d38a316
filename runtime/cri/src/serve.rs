//! The unix socket, and the server on it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use husk_pods::{Node, span};
use husk_proto::cri::image_service_server::ImageServiceServer;
use husk_proto::cri::runtime_service_server::RuntimeServiceServer;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::image_service::Images;
use crate::runtime_service::Runtime;

/// Largest message, as the kubelet has it.
pub(crate) const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// How long requests under way may take to end once huskd is to stop. Some wait
/// for a container's end or for a registry; whoever asks again asks the next
/// huskd, which takes up or tears down whatever they had begun.
const LAST_REQUESTS: Duration = Duration::from_secs(10);

/// Serves until `stop` resolves, and a little longer for requests under way. After
/// each pull of an image `trim` is called: to give back the memory that it took.
///
/// # Errors
/// A socket that cannot be had, for one because another huskd has it.
pub async fn serve(node: Arc<Node>, trim: fn(), stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let path = node.config.socket.clone();
    let listener = listen(&path).await?;
    tracing::info!(socket = %path.display(), "serving CRI v1");
    let images = ImageServiceServer::new(Images::new(node.images.clone(), &node.config.images.pinned, trim))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let events = node.events.clone();
    let runtime = RuntimeServiceServer::new(Runtime::new(node))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let (told, stopping) = oneshot::channel();
    // The last part of a path is the RPC's name (gRPC over HTTP/2, "Requests").
    let mut server = Server::builder()
        .trace_fn(|request| span::rpc(request.uri().path().rsplit('/').next().unwrap_or_default()));
    let serving = server.add_service(runtime).add_service(images).serve_with_incoming_shutdown(
        UnixListenerStream::new(listener),
        async move {
            stop.await;
            events.close();
            let _ = told.send(());
        },
    );
    let enough = async {
        if stopping.await.is_err() {
            // The server ends by itself.
            std::future::pending::<()>().await;
        }
        sleep(LAST_REQUESTS).await;
    };
    tokio::select! {
        served = serving => served.context("serve CRI")?,
        () = enough => {
            let seconds = LAST_REQUESTS.as_secs();
            tracing::warn!(seconds, "requests under way have not ended, and are given up");
        }
    }
    let _ = tokio::fs::remove_file(&path).await;
    Ok(())
}

/// Listens, in the place of a huskd that has gone but not of one that lives.
async fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        tokio::fs::create_dir_all(folder)
            .await
            .with_context(|| format!("make folder {}", folder.display()))?;
    }
    if UnixStream::connect(path).await.is_ok() {
        anyhow::bail!("listen on {}: another huskd serves there; stop it first", path.display());
    }
    let _ = tokio::fs::remove_file(path).await;
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    tokio::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .await
        .with_context(|| format!("set permissions of {}", path.display()))?;
    Ok(listener)
}
