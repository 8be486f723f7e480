# CPU seconds an iteration of flexmix or mixtools takes, a line a turn; see hme_packages.py, which runs this.
# Usage: Rscript hme_packages.R PACKAGE ROWS.csv INPUTS EXPERTS TURNS SHORT LONG
options(warn = -1)
told <- commandArgs(trailingOnly = TRUE)
number <- as.integer(told[3:7])
inputs <- number[1]; experts <- number[2]; turns <- number[3]; short <- number[4]; long <- number[5]
rows <- as.matrix(read.csv(told[2], header = FALSE))
x <- rows[, seq_len(inputs), drop = FALSE]
y <- rows[, -seq_len(inputs), drop = FALSE]

fit_flexmix <- function(iterations) {
  data <- c(list(x = x), lapply(seq_len(ncol(y)), function(o) y[, o]))
  names(data)[-1] <- paste0("y", seq_len(ncol(y)))
  models <- lapply(names(data)[-1], function(name) FLXMRglm(as.formula(paste(name, "~ x"))))
  fit <- flexmix(y1 ~ x, data = data, cluster = start, model = models, concomitant = FLXPmultinom(~ x),
                 control = list(iter.max = iterations, minprior = 0, tolerance = 0, classify = "weighted"))
  if (fit@iter != iterations || fit@k != experts) stop("flexmix stopped early or lost an expert")
}

fit_mixtools <- function(iterations) {
  set.seed(0)
  capture.output(fit <- hmeEM(y[, 1], x, k = 2, epsilon = -Inf, maxit = iterations))
  if (fit$restarts != 0 || length(fit$all.loglik) != iterations + 1) stop("hmeEM began anew or stopped early")
}

suppressMessages(library(told[1], character.only = TRUE))
set.seed(0)
start <- matrix(runif(nrow(x) * experts), nrow(x))
start <- start / rowSums(start)
fit <- if (told[1] == "flexmix") fit_flexmix else fit_mixtools
seconds <- function(iterations) sum(system.time(fit(iterations))[1:2])
if (told[1] == "mixtools") seconds(1)  # compiles what R runs; in a fit of minutes it does not show
for (turn in seq_len(turns)) {
  brief <- seconds(short)
  cat((seconds(long) - brief) / (long - short), "\n")
}
