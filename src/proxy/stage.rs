//! A tower layer whose logic is one `async fn` that reads from top to bottom.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tower::{Layer, Service};

/// One stage of the way of a request: what it does with a request, given what lies beneath it.
pub(super) trait Stage<Request, Inner>: Send + Sync + 'static {
    type Response;
    type Error;

    fn handle(
        &self,
        request: Request,
        inner: Inner,
    ) -> impl Future<Output = Result<Self::Response, Self::Error>> + Send;
}

/// Makes a tower layer of a stage. What lies beneath it must always be ready, as everything in this
/// stack is: nothing queues.
pub(super) struct StageLayer<T>(Arc<T>);

pub(super) fn layer<T>(stage: T) -> StageLayer<T> {
    StageLayer(Arc::new(stage))
}

impl<T, Inner> Layer<Inner> for StageLayer<T> {
    type Service = StageService<T, Inner>;

    fn layer(&self, inner: Inner) -> Self::Service {
        StageService(Arc::new((Arc::clone(&self.0), inner)))
    }
}

/// A stage and what lies beneath it, behind one reference count: a request clones each level once, not
/// each level with all below it.
pub(super) struct StageService<T, Inner>(Arc<(Arc<T>, Inner)>);

impl<T, Inner> Clone for StageService<T, Inner> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T, Inner, Request> Service<Request> for StageService<T, Inner>
where
    T: Stage<Request, Inner>,
    Inner: Clone + Send + Sync + 'static,
    Request: Send + 'static,
{
    type Response = T::Response;
    type Error = T::Error;
    type Future = Pin<Box<dyn Future<Output = Result<T::Response, T::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let shared = Arc::clone(&self.0);
        Box::pin(async move { shared.0.handle(request, shared.1.clone()).await })
    }
}
