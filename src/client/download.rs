//! Answers that are too large to be kept: the caller takes them piece by piece.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, header};
use http_body_util::Full;
use tokio::time::timeout;

use super::{Address, Api, ApiResponse, NodeError, NodeFailure, Unreachable, refusal};
use crate::http_client::{HttpError, OpenAnswer};

/// Longest wait for the head of the answer: the node may have to read a checkpoint first.
const HEAD_MAX: Duration = Duration::from_secs(15);
/// Longest silence within the body.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Answer to a request for a download.
pub enum Download {
    /// The node gives it.
    Open(DownloadBody),
    /// The node gives none, and says why.
    Refused(ApiResponse),
}

/// The body of a download.
pub struct DownloadBody {
    address: Address,
    answer: OpenAnswer,
}

impl DownloadBody {
    /// Returns the next piece, which may be empty; none at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Unreachable> {
        let error = match timeout(SILENCE_MAX, self.answer.next()).await {
            Ok(Ok(piece)) => return Ok(piece),
            Ok(Err(error)) => NodeError::from(error),
            Err(_) => NodeError::Silent { within: SILENCE_MAX },
        };
        Err(Unreachable { failed: vec![NodeFailure::new(&self.address, error)] })
    }
}

impl Api {
    /// Asks for a download from the first node that answers.
    pub async fn download(&self, path: &str) -> Result<Download, Unreachable> {
        let mut failed = Vec::new();
        for index in self.order() {
            let address = &self.addresses[index];
            match self.open_download(address, path).await {
                Ok(answer) if answer.status.is_success() => {
                    return Ok(Download::Open(DownloadBody { address: address.clone(), answer }));
                }
                Ok(answer) => return Ok(Download::Refused(refusal(address, answer).await.answer)),
                Err(error) => failed.push(NodeFailure::new(address, error)),
            }
        }
        Err(Unreachable { failed })
    }

    async fn open_download(&self, address: &Address, path: &str) -> Result<OpenAnswer, HttpError> {
        let request = self.request(Method::GET, address, path).header(header::ACCEPT, "application/octet-stream");
        self.http.open(request.body(Full::default())?, HEAD_MAX).await
    }
}
