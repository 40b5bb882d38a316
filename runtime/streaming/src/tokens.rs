//! The URLs that a client gets for an exec, an attach or a port-forward: each
//! holds a secret, works once, and not for long.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::time::Instant;

use husk_base::lock;

/// The life of a URL that no client has used.
pub const LIFETIME: Duration = Duration::from_secs(60);

/// Most URLs that wait at a time.
pub const MAX_WAITING: usize = 1000;

/// Bytes of randomness in a token.
const SECRET: usize = 24;

/// No token can be given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too many wait already.
    #[error(
        "{MAX_WAITING} streaming URLs wait for their clients: use them, or wait a minute for them to expire"
    )]
    Full,
    /// The kernel gave no random bytes.
    #[error("make a token: the kernel gave no random bytes")]
    NoRandomness,
}

/// Sessions that wait for their clients, by token.
#[derive(Debug)]
pub struct Tokens<T>(Mutex<HashMap<String, (Instant, T)>>);

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Tokens<T> {
    /// Keeps `what` for whoever brings the token.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub fn give(&self, what: T) -> Result<String, Error> {
        let mut secret = [0u8; SECRET];
        husk_base::random::fill(&mut secret).map_err(|_| Error::NoRandomness)?;
        let token = URL_SAFE_NO_PAD.encode(secret);
        let mut waiting = lock(&self.0);
        let now = Instant::now();
        waiting.retain(|_, (until, _)| *until > now);
        if waiting.len() >= MAX_WAITING {
            return Err(Error::Full);
        }
        waiting.insert(token.clone(), (now + LIFETIME, what));
        Ok(token)
    }

    /// Lets go what nobody has come for: it may hold a machine that has ended.
    pub fn forget_expired(&self) {
        let now = Instant::now();
        lock(&self.0).retain(|_, (until, _)| *until > now);
    }

    /// Takes out what a token stands for, if it has not expired.
    pub fn take(&self, token: &str) -> Option<T> {
        let (until, what) = lock(&self.0).remove(token)?;
        (until > Instant::now()).then_some(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_a_wrong_one_never() {
        let tokens = Tokens::default();
        let token = tokens.give(1).unwrap();
        assert_ne!(token, tokens.give(2).unwrap());
        assert!(token.len() >= 32, "{token}");
        assert_eq!(tokens.take(&token[1..]), None);
        assert_eq!(tokens.take(""), None);
        assert_eq!(tokens.take(&token), Some(1));
        assert_eq!(tokens.take(&token), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_expires_and_gives_its_place_back() {
        let tokens = Tokens::default();
        let first = tokens.give(0).unwrap();
        for n in 1..MAX_WAITING {
            tokens.give(n).unwrap();
        }
        assert_eq!(tokens.give(0), Err(Error::Full));
        tokio::time::advance(LIFETIME).await;
        assert_eq!(tokens.take(&first), None);
        assert!(tokens.give(0).is_ok());
        assert_eq!(lock(&tokens.0).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_comes_for_is_let_go() {
        let tokens = Tokens::default();
        let what = std::sync::Arc::new(());
        tokens.give(what.clone()).unwrap();
        tokens.forget_expired();
        assert_eq!(std::sync::Arc::strong_count(&what), 2);
        tokio::time::advance(LIFETIME).await;
        tokens.forget_expired();
        assert_eq!(std::sync::Arc::strong_count(&what), 1);
    }
}
