//! The HTTP server: checks the token, agrees on a protocol, and hands the
//! connection over.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming as Body;
use hyper::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

use super::negotiate::{self, Carrier};
use super::peer::Peer;
use super::session::Session;
use super::tokens::Tokens;
use super::waiting::{Place, Waiting};
use super::{ports, remote_command, spdy, tokens, tunnel, websocket};

/// Most sessions at a time, each of a client that has brought a token.
const MAX_SESSIONS: usize = 1000;

/// The time that a client has to send a request's head.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);

/// The longest life of a connection without a session.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// Longest head, bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Serves for ever.
pub async fn serve(listener: TcpListener, tokens: Arc<Tokens<Session>>) {
    let forgetting = tokens.clone();
    let _forgetting = AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(tokens::LIFETIME).await;
            forgetting.forget_expired();
        }
    }));
    let waiting = Arc::<Waiting>::default();
    let sessions = Arc::new(Semaphore::new(MAX_SESSIONS));
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let serving = connection(socket, tokens.clone(), waiting.enter(), sessions.clone());
                drop(tokio::spawn(serving));
            }
            Err(error) => {
                tracing::warn!(%error, "accept a streaming client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(socket: TcpStream, tokens: Arc<Tokens<Session>>, place: Place, sessions: Arc<Semaphore>) {
    // A key that is typed shall not wait for the next.
    let _ = socket.set_nodelay(true);
    if let Err(error) = keep_alive(&socket) {
        tracing::debug!(%error, "keep a streaming client's connection alive");
    }
    let evicted = place.evicted();
    let held = std::sync::Mutex::new(Some((Peer::of(&socket), place)));
    let service = service_fn(|request| {
        let answer = answer(request, &tokens, &held, &sessions);
        async { Ok::<_, std::convert::Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    // The place is released with the answer, also with one that switches to a session.
    tokio::select! {
        served = tokio::time::timeout(REQUEST_DEADLINE, served) => match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "streaming client"),
            Err(_) => tracing::debug!("a streaming client did not end its request in time"),
        },
        () = evicted.cancelled() => {
            tracing::debug!("too many streaming clients have sent no request: the oldest was closed");
        }
    }
}

/// Has the kernel ask a client that is silent whether it is still there: the
/// path to it may forget a connection that nothing passes, and a client whose
/// machine has gone says nothing any more. By default it asks after two hours.
fn keep_alive(socket: &TcpStream) -> nix::Result<()> {
    setsockopt(socket, sockopt::TcpKeepIdle, &60)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &15)?;
    setsockopt(socket, sockopt::TcpKeepCount, &4)?;
    setsockopt(socket, sockopt::KeepAlive, &true)
}

/// The parts of a connection that a session takes over.
type Held = std::sync::Mutex<Option<(Peer, Place)>>;

fn answer(
    mut request: Request<Body>,
    tokens: &Tokens<Session>,
    held: &Held,
    sessions: &Arc<Semaphore>,
) -> Response<String> {
    let mut path = request.uri().path().trim_start_matches('/').splitn(2, '/');
    let (kind, token) = (path.next().unwrap_or_default(), path.next().unwrap_or_default());
    let Some(session) = tokens.take(token).filter(|session| session.path() == kind) else {
        return refuse(
            StatusCode::NOT_FOUND,
            "this address is not known, was used already, or has expired: ask the runtime for a new one",
        );
    };
    if request.method() != Method::GET && request.method() != Method::POST {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "GET and POST are understood");
    }
    let carrier = match negotiate::carrier(request.headers()) {
        Ok(carrier) => carrier,
        Err(problem) => return refuse(StatusCode::BAD_REQUEST, problem),
    };
    let Some((peer, place)) = husk_base::lock(held).take() else {
        return refuse(StatusCode::BAD_REQUEST, "one request for each connection");
    };
    drop(place);
    let Ok(permit) = sessions.clone().try_acquire_owned() else {
        return refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "too many sessions are open: close some, and try again",
        );
    };
    let held = (peer, permit);
    let upgrade = hyper::upgrade::on(&mut request);
    match carrier {
        Carrier::Spdy => over_spdy(&request, upgrade, session, held),
        Carrier::WebSocket { accept } => over_websocket(&request, upgrade, &accept, session, held),
    }
}

fn over_spdy(
    request: &Request<Body>,
    upgrade: OnUpgrade,
    session: Session,
    (peer, permit): (Peer, OwnedSemaphorePermit),
) -> Response<String> {
    let names: Vec<&str> = negotiate::values(request.headers(), negotiate::STREAM_PROTOCOL).collect();
    let protocol = match &session {
        // The oldest clients name nothing, and are not told anything.
        _ if names.is_empty() => Some((negotiate::OLDEST, "")),
        Session::Exec(..) | Session::Attach(..) => {
            negotiate::choose(names.into_iter(), &negotiate::SPDY_PROTOCOLS)
                .map(|chosen| (chosen, chosen.name))
        }
        Session::Ports(_) => {
            names.contains(&negotiate::PORTS).then_some((negotiate::OLDEST, negotiate::PORTS))
        }
    };
    let Some((protocol, name)) = protocol else {
        let mut refused = refuse(StatusCode::FORBIDDEN, "none of these stream protocols is spoken here");
        let ours = match session {
            Session::Ports(_) => vec![negotiate::PORTS],
            _ => negotiate::SPDY_PROTOCOLS.iter().map(|protocol| protocol.name).collect(),
        };
        for name in ours {
            add(&mut refused, HeaderName::from_static(negotiate::ACCEPTED_PROTOCOLS), name);
        }
        return refused;
    };
    tokio::spawn(async move {
        let _permit = permit;
        let Ok(upgraded) = upgrade.await else { return };
        let connection = spdy::Connection::start(TokioIo::new(upgraded), peer);
        match session {
            Session::Exec(options, run) | Session::Attach(options, run) => {
                remote_command::serve(connection, options, protocol, run).await;
            }
            Session::Ports(connect) => ports::serve(connection, connect).await,
        }
    });
    let mut answer = switch(negotiate::SPDY);
    if !name.is_empty() {
        add(&mut answer, HeaderName::from_static(negotiate::STREAM_PROTOCOL), name);
    }
    answer
}

fn over_websocket(
    request: &Request<Body>,
    upgrade: OnUpgrade,
    accept: &str,
    session: Session,
    (peer, permit): (Peer, OwnedSemaphorePermit),
) -> Response<String> {
    let names: Vec<&str> = negotiate::values(request.headers(), SEC_WEBSOCKET_PROTOCOL.as_str()).collect();
    let protocol = match &session {
        // As over SPDY.
        Session::Exec(..) | Session::Attach(..) if names.is_empty() => {
            Some((negotiate::OLDEST_WEBSOCKET, ""))
        }
        Session::Exec(..) | Session::Attach(..) => {
            negotiate::choose(names.into_iter(), &negotiate::WEBSOCKET_PROTOCOLS)
                .map(|chosen| (chosen, chosen.name))
        }
        Session::Ports(_) => names
            .contains(&negotiate::PORTS_TUNNELLED)
            .then_some((negotiate::OLDEST, negotiate::PORTS_TUNNELLED)),
    };
    let Some((protocol, name)) = protocol else {
        let ours = match session {
            Session::Ports(_) => negotiate::PORTS_TUNNELLED.to_owned(),
            _ => negotiate::WEBSOCKET_PROTOCOLS.map(|protocol| protocol.name).join(", "),
        };
        return refuse(StatusCode::BAD_REQUEST, &format!("spoken here over WebSocket: {ours}"));
    };
    tokio::spawn(async move {
        let _permit = permit;
        let Ok(upgraded) = upgrade.await else { return };
        let socket = tunnel::socket(TokioIo::new(upgraded)).await;
        match session {
            Session::Exec(options, run) | Session::Attach(options, run) => {
                websocket::serve(socket, peer, options, protocol, run).await;
            }
            Session::Ports(connect) => {
                let connection = spdy::Connection::start(tunnel::Tunnel::new(socket), peer);
                ports::serve(connection, connect).await;
            }
        }
    });
    let mut answer = switch("websocket");
    add(&mut answer, SEC_WEBSOCKET_ACCEPT, accept);
    if !name.is_empty() {
        add(&mut answer, SEC_WEBSOCKET_PROTOCOL, name);
    }
    answer
}

fn switch(to: &str) -> Response<String> {
    let mut answer = Response::new(String::new());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    add(&mut answer, CONNECTION, "Upgrade");
    add(&mut answer, UPGRADE, to);
    answer
}

fn refuse(status: StatusCode, problem: &str) -> Response<String> {
    let mut answer = Response::new(format!("{problem}\n"));
    *answer.status_mut() = status;
    add(&mut answer, CONNECTION, "close");
    answer
}

fn add(answer: &mut Response<String>, name: HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        answer.headers_mut().append(name, value);
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::*;

    #[tokio::test]
    async fn a_client_that_is_silent_is_looked_for_within_minutes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        keep_alive(&socket).unwrap();
        assert!(getsockopt(&socket, sockopt::KeepAlive).unwrap());
        let seconds = getsockopt(&socket, sockopt::TcpKeepIdle).unwrap()
            + getsockopt(&socket, sockopt::TcpKeepInterval).unwrap()
                * getsockopt(&socket, sockopt::TcpKeepCount).unwrap();
        assert!(seconds <= 180, "{seconds}");
    }
}
