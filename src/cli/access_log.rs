//! Opens the access log of a node or of `aviary proxy`.

use std::path::Path;

use super::log_file::LogFile;
use crate::proxy::access::AccessLog;
use crate::proxy::settings::AccessLogSettings;

/// File name that stands for standard output.
const STDOUT: &str = "-";

/// Opens the log that the settings name, if they name one; returns its file too, unless it is standard output.
pub fn open(settings: Option<&AccessLogSettings>) -> anyhow::Result<(AccessLog, Option<LogFile>)> {
    let Some(AccessLogSettings { file, format, sample_percent }) = settings else { return Ok(Default::default()) };
    if file == Path::new(STDOUT) {
        return Ok((AccessLog::start(std::io::stdout(), *format, *sample_percent)?, None));
    }
    let file = LogFile::open(file)?;
    Ok((AccessLog::start(file.clone(), *format, *sample_percent)?, Some(file)))
}
