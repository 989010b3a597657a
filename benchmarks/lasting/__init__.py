"""Which score of a pruned network tells what it is worth after fine-tuning? A study of many plans of one network.

    plans       many unlike plans at some budgets                              plans/<plan>.json
    truth       accuracy after a fixed fine-tuning, on images held out of it   truth/<plan>-seed<seed>.json
    scores      what every candidate says before that, and what it costs       scores/<plan>.json
    report      rank correlation and regret against cost                       report.md, scores.csv, lasting.png
    predictors  coefficients for the reward `predicted`                        predictors/<repair>.json

Every record is written when it is done: a stopped study goes on where it was, and several processes may share a
folder, each making what no other is making. Run `python -m benchmarks.lasting --help`.
"""
