//! Lists as streams: the same items as the plain call's, in messages of a
//! bounded size, for nodes with more than fits into one.

use futures::stream;
use tonic::Response;

use super::{Answer, Error, Items};

/// Most items in one message.
const BATCH: usize = 500;

/// Answers with `items`, packed by `pack`. No items are no message.
pub(in crate::cri) fn in_batches<T, R>(
    items: Result<Vec<T>, Error>,
    pack: fn(Vec<T>) -> R,
) -> Answer<Items<R>>
where
    T: Send + 'static,
    R: Send + 'static,
{
    let mut items = items?.into_iter();
    let mut messages = Vec::new();
    loop {
        let batch: Vec<T> = items.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            break;
        }
        messages.push(Ok(pack(batch)));
    }
    Ok(Response::new(Box::pin(stream::iter(messages))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn every_item_comes_once_and_in_order() {
        for count in [0, 1, BATCH, BATCH * 2 + 1] {
            let numbers: Vec<usize> = (0..count).collect();
            let stream = in_batches(Ok(numbers.clone()), |batch| batch).unwrap().into_inner();
            let batches: Vec<Vec<usize>> = stream.map(Result::unwrap).collect().await;
            assert!(batches.iter().all(|batch| batch.len() <= BATCH));
            assert_eq!(batches.concat(), numbers);
        }
    }

    #[test]
    fn an_error_is_the_answer() {
        let failed = in_batches::<u8, _>(Err(Error::Internal("x".into())), |batch| batch);
        assert!(failed.is_err());
    }
}
