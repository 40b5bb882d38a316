//! A client of one registry, for the part of the OCI distribution specification that a pull
//! needs.
//!
//! The author of an image's name chooses the server that is asked for it, and servers name
//! others that grant tokens. So no answer is kept in memory without a bound, and
//! [`Referrals`] checks the servers that the registry sends huskd to.

use std::fmt;
use std::sync::{Arc, Mutex};

use base64::Engine;
use http_auth::ChallengeParser;
use husk_base::{chain, lock};
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, WWW_AUTHENTICATE,
};
use reqwest::{Client, ClientBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use super::referral::{Referrals, Resolver};

/// Most bytes of an answer that grants a token.
const MAX_TOKEN: usize = 1 << 20;
/// Most bytes of an error's body that are read.
const MAX_ERROR: usize = 64 << 10;
/// Most characters of an error's text that are passed on.
const MAX_WORDS: usize = 500;
/// Most redirects of a request.
const MAX_REDIRECTS: usize = 10;

/// The identity under which a registry is asked.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// Without credentials.
    Anonymous,
    /// A user with a password.
    Basic(String, String),
    /// A token that is passed to the registry as it is.
    Bearer(String),
}

// Secrets are left out.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => write!(f, "Anonymous"),
            Self::Basic(user, _) => write!(f, "Basic({user:?}, …)"),
            Self::Bearer(_) => write!(f, "Bearer(…)"),
        }
    }
}

/// A repository of a registry.
pub(super) struct Registry {
    /// The client for the registry itself.
    http: Client,
    /// The client for servers that the registry sends huskd to.
    referred: Client,
    referrals: Arc<Referrals>,
    /// The URL up to the repository: "https://registry.example/v2/library/nginx".
    url: String,
    /// The query that tells a mirror which registry it stands for.
    query: String,
    repository: String,
    credentials: Credentials,
    /// The header that the registry demands.
    authorization: Mutex<Option<HeaderValue>>,
}

/// The reason that a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The registry cannot be reached, or the connection broke.
    #[error("{}", chain(.0))]
    Http(#[from] reqwest::Error),
    /// The registry answered with an error status.
    #[error("HTTP status {status}{words}")]
    Status {
        status: StatusCode,
        /// The specification's error codes.
        codes: Vec<String>,
        words: String,
    },
    /// No token was granted.
    #[error("token from {0}")]
    Token(String),
    /// The registry sends huskd to a server that is not allowed.
    #[error("{0}")]
    Referral(String),
    /// The answer is larger than the limit.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

impl Registry {
    /// Makes a client. `address` is a host with or without a port, followed by the
    /// part of the path before `/v2`; `namespace` is the registry that a mirror
    /// stands for. `client` makes HTTP clients, and `trusted` are hosts that the
    /// registry may send huskd to whatever their addresses are.
    ///
    /// # Errors
    /// The address is invalid, or a client cannot be made.
    pub(super) fn new(
        client: impl Fn() -> ClientBuilder,
        (plain, address): (bool, &str),
        repository: &str,
        namespace: Option<&str>,
        credentials: Credentials,
        trusted: &[String],
    ) -> Result<Self, String> {
        let scheme = if plain { "http" } else { "https" };
        let authorization = match &credentials {
            Credentials::Bearer(token) => header("Bearer", token),
            _ => None,
        };
        let url = format!("{scheme}://{address}/v2/{repository}");
        let own = Url::parse(&url).map_err(|error| format!("`{address}`: {error}"))?;
        let referrals = Arc::new(Referrals::new(own, trusted));
        let build = |client: ClientBuilder| {
            let client = client.redirect(reqwest::redirect::Policy::none());
            client.build().map_err(|error| chain(&error))
        };
        Ok(Self {
            http: build(client())?,
            referred: build(client().dns_resolver(Arc::new(Resolver(referrals.clone()))))?,
            referrals,
            url,
            query: namespace.map(|namespace| format!("?ns={namespace}")).unwrap_or_default(),
            repository: repository.to_owned(),
            credentials,
            authorization: Mutex::new(authorization),
        })
    }

    /// Fetches the manifest with a tag or a digest, of at most `most` bytes, and the
    /// registry's media type for it.
    pub(super) async fn manifest(
        &self,
        name: &str,
        accept: &str,
        most: usize,
    ) -> Result<(Vec<u8>, Option<String>), Failure> {
        let response = self.get(&format!("manifests/{name}"), accept).await?;
        let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type =
            media_type.and_then(|text| text.split(';').next()).map(|text| text.trim().to_owned());
        Ok((whole(response, most).await?, media_type))
    }

    /// Begins to fetch the blob with a digest; its body is not read yet.
    pub(super) async fn blob(&self, digest: &str) -> Result<Response, Failure> {
        self.get(&format!("blobs/{digest}"), "*/*").await
    }

    async fn get(&self, path: &str, accept: &str) -> Result<Response, Failure> {
        let url = format!("{}/{path}{}", self.url, self.query);
        let url = Url::parse(&url).map_err(|error| Failure::Referral(format!("`{url}`: {error}")))?;
        let mut challenged = false;
        loop {
            let authorization = lock(&self.authorization).clone();
            let response = self.follow(&url, accept, authorization).await?;
            let status = response.status();
            if status == StatusCode::OK {
                return Ok(response);
            }
            // A token may have expired, so this also serves later requests. A 401
            // of another host, to which the registry has sent us, does not count.
            if status == StatusCode::UNAUTHORIZED && !challenged && self.referrals.is_own(response.url()) {
                challenged = true;
                if let Some(authorization) = self.authorize(response.headers()).await? {
                    *lock(&self.authorization) = Some(authorization);
                    continue;
                }
            }
            return Err(Failure::from_response(response).await);
        }
    }

    /// Requests `start`, and follows redirects. `authorization` is for the
    /// server of `start` alone.
    async fn follow(
        &self,
        start: &Url,
        accept: &str,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        let mut url = start.clone();
        for _ in 0..=MAX_REDIRECTS {
            let own = self.referrals.is_own(&url);
            let http = if own { &self.http } else { &self.referred };
            let mut request = http.get(url.clone()).header(ACCEPT, accept);
            if let Some(authorization) = authorization.clone().filter(|_| url.origin() == start.origin()) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = request.send().await?;
            if own {
                self.referrals.answered(response.remote_addr()).await;
            }
            let Some(next) = redirect(&response)? else { return Ok(response) };
            self.referrals.check(&next).map_err(Failure::Referral)?;
            url = next;
        }
        Err(Failure::Referral(format!("the registry sends huskd on more than {MAX_REDIRECTS} times")))
    }

    /// Makes the header that the registry demands; `None` if no header would
    /// help.
    async fn authorize(&self, headers: &HeaderMap) -> Result<Option<HeaderValue>, Failure> {
        if matches!(self.credentials, Credentials::Bearer(_)) {
            return Ok(None);
        }
        let (mut token, mut basic) = (None, false);
        for text in headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()) {
            for challenge in ChallengeParser::new(text).flatten() {
                if challenge.scheme.eq_ignore_ascii_case("Bearer") {
                    let named = |name: &str| {
                        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                        found.map(|(_, value)| value.to_unescaped())
                    };
                    token = token.or_else(|| Some((named("realm")?, named("service"), named("scope"))));
                }
                basic |= challenge.scheme.eq_ignore_ascii_case("Basic");
            }
        }
        match (token, &self.credentials) {
            (Some((realm, service, scope)), _) => self.token(&realm, service, scope).await.map(Some),
            (None, Credentials::Basic(user, password)) if basic => {
                Ok(header("Basic", &base64(user, password)))
            }
            _ => Ok(None),
        }
    }

    /// Asks `realm` for a token that the registry takes.
    async fn token(
        &self,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<HeaderValue, Failure> {
        let wrong = |what: String| Failure::Token(format!("{}: {what}", sanitize(realm)));
        let mut url = Url::parse(realm).map_err(|error| wrong(error.to_string()))?;
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        self.referrals.check(&url).map_err(Failure::Referral)?;
        let authorization = match &self.credentials {
            Credentials::Basic(..) if !self.referrals.may_know_password(&url) => {
                return Err(Failure::Referral(format!(
                    "the registry wants the password at `{}`, a host outside of its own domain; if that is right, \
                     name the host under `trusted_hosts` of [images]",
                    sanitize(realm)
                )));
            }
            Credentials::Basic(user, password) => header("Basic", &base64(user, password)),
            _ => None,
        };
        let response = self.follow(&url, "*/*", authorization).await?;
        if response.status() != StatusCode::OK {
            let failure = Failure::from_response(response).await;
            // A realm that was not found says nothing about the image.
            return Err(if failure.may_pass() { failure } else { wrong(failure.to_string()) });
        }
        let answer = whole(response, MAX_TOKEN).await.map_err(|failure| match failure {
            Failure::TooLarge(_) => wrong(failure.to_string()),
            failure => failure,
        })?;
        let granted: Granted = serde_json::from_slice(&answer).map_err(|error| wrong(error.to_string()))?;
        let token =
            [granted.token, granted.access_token].into_iter().flatten().find(|token| !token.is_empty());
        token
            .and_then(|token| header("Bearer", &token))
            .ok_or_else(|| wrong("there is no token in the answer".into()))
    }
}

/// A realm's answer, which has one of the two.
#[derive(Deserialize)]
struct Granted {
    token: Option<String>,
    access_token: Option<String>,
}

/// The body of an error, as specified.
#[derive(Deserialize)]
struct ErrorDocument {
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    message: Option<String>,
}

impl Failure {
    /// Makes a failure of an error's body.
    async fn from_response(mut response: Response) -> Self {
        let status = response.status();
        let mut body = Vec::new();
        // A body that breaks off is used as far as it came.
        while body.len() < MAX_ERROR
            && let Ok(Some(chunk)) = response.chunk().await
        {
            let room = MAX_ERROR - body.len();
            body.extend_from_slice(chunk.get(..room).unwrap_or(&chunk));
        }
        let told = serde_json::from_slice::<ErrorDocument>(&body).map(|told| told.errors).unwrap_or_default();
        let text = match &told[..] {
            [] => String::from_utf8_lossy(&body).into_owned(),
            told => told
                .iter()
                .map(|error| format!("{} {}", error.code, error.message.as_deref().unwrap_or_default()))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let text = sanitize(text.trim());
        let words = if text.is_empty() { text } else { format!(": {text}") };
        Self::Status { status, codes: told.into_iter().map(|error| error.code).collect(), words }
    }

    /// Whether the registry says that it does not have the image.
    pub(super) fn is_not_found(&self) -> bool {
        self.says(
            &[StatusCode::NOT_FOUND],
            &["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "NOT_FOUND", "BLOB_UNKNOWN"],
        )
    }

    /// Whether the registry, or its realm, demands other credentials.
    pub(super) fn is_unauthorized(&self) -> bool {
        matches!(self, Self::Token(_))
            || self.says(&[StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN], &["UNAUTHORIZED", "DENIED"])
    }

    fn says(&self, statuses: &[StatusCode], words: &[&str]) -> bool {
        match self {
            Self::Status { status, codes, .. } => {
                statuses.contains(status) || codes.iter().any(|code| words.contains(&code.as_str()))
            }
            _ => false,
        }
    }

    /// Whether no data came for too long.
    pub(super) fn is_timeout(&self) -> bool {
        matches!(self, Self::Http(error) if error.is_timeout())
    }

    /// Whether trying again may help.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Http(error) => error.is_connect(),
            Self::Status { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            Self::Token(_) | Self::Referral(_) | Self::TooLarge(_) => false,
        }
    }
}

/// The URL of a redirect.
fn redirect(response: &Response) -> Result<Option<Url>, Failure> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let next = location.and_then(|location| response.url().join(location).ok());
    next.map(Some)
        .ok_or_else(|| Failure::Referral("the registry sends huskd on, and does not say where".into()))
}

/// Reads an answer of at most `most` bytes.
async fn whole(mut response: Response, most: usize) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if chunk.len() > most - body.len() {
            return Err(Failure::TooLarge(most));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn base64(user: &str, password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
}

/// Makes a header; `None` for a secret that no header can carry.
fn header(scheme: &str, secret: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("{scheme} {secret}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Makes a server's text fit for one line of a message.
fn sanitize(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS).collect()
}
