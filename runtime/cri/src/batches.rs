//! Lists as streams: the same items as the plain call's, in messages of a
//! bounded size, for nodes with more than fits into one.

use futures::stream;
use husk_pods::Error;
use prost::Message;
use tonic::Response;

use crate::runtime_service::{Answer, Items};
use crate::status;

/// Most bytes of items in one message, unless a single item has more.
const BATCH: usize = 1 << 20;

/// More than what a message has around each item.
const FRAME: usize = 8;

/// Answers with `items`, packed by `pack`. No items are no message.
pub(crate) fn in_batches<T, R>(items: Result<Vec<T>, Error>, pack: fn(Vec<T>) -> R) -> Answer<Items<R>>
where
    T: Message + 'static,
    R: Send + 'static,
{
    let mut messages = Vec::new();
    let (mut batch, mut size) = (Vec::new(), 0);
    for item in items.map_err(|error| status::of(&error))? {
        let length = item.encoded_len() + FRAME;
        if size + length > BATCH && !batch.is_empty() {
            messages.push(Ok(pack(std::mem::take(&mut batch))));
            size = 0;
        }
        size += length;
        batch.push(item);
    }
    if !batch.is_empty() {
        messages.push(Ok(pack(batch)));
    }
    Ok(Response::new(Box::pin(stream::iter(messages))))
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use husk_proto::cri::{Container, StreamContainersResponse};

    use super::*;
    use crate::serve::MAX_MESSAGE;

    #[tokio::test]
    async fn every_item_comes_once_and_in_order_in_messages_that_can_be_sent() {
        // Small ones, ones of which a message holds two, and some that fill one.
        for (count, size) in [(0, 1), (1, 1), (30_000, 50), (9, BATCH / 2 - 99), (5, BATCH * 3)] {
            let id = |number: usize| format!("{number}-{}", "x".repeat(size));
            let items: Vec<_> =
                (0..count).map(|number| Container { id: id(number), ..Default::default() }).collect();
            let stream =
                in_batches(Ok(items.clone()), |containers| StreamContainersResponse { containers }).unwrap();
            let messages: Vec<_> = stream.into_inner().map(Result::unwrap).collect().await;
            for message in &messages {
                let length = message.encoded_len();
                assert!(!message.containers.is_empty() && length < MAX_MESSAGE, "{length}");
            }
            let bytes: usize = items.iter().map(Message::encoded_len).sum();
            assert!(messages.len() <= bytes.div_ceil(BATCH / 2).max(count.min(1)), "{}", messages.len());
            let sent = messages.into_iter().flat_map(|message| message.containers).collect::<Vec<_>>();
            assert!(sent == items, "{count} of {size}");
        }
    }

    #[test]
    fn an_error_is_the_answer() {
        let failed = in_batches::<Container, _>(Err(Error::Broken("x".into())), |batch| batch);
        assert!(failed.is_err());
    }
}
