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
        StageService { stage: Arc::clone(&self.0), inner }
    }
}

pub(super) struct StageService<T, Inner> {
    stage: Arc<T>,
    inner: Inner,
}

impl<T, Inner: Clone> Clone for StageService<T, Inner> {
    fn clone(&self) -> Self {
        Self { stage: Arc::clone(&self.stage), inner: self.inner.clone() }
    }
}

impl<T, Inner, Request> Service<Request> for StageService<T, Inner>
where
    T: Stage<Request, Inner>,
    Inner: Clone + Send + 'static,
    Request: Send + 'static,
{
    type Response = T::Response;
    type Error = T::Error;
    type Future = Pin<Box<dyn Future<Output = Result<T::Response, T::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let stage = Arc::clone(&self.stage);
        let inner = self.inner.clone();
        Box::pin(async move { stage.handle(request, inner).await })
    }
}
