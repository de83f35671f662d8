"""Code that several drivers need in the same form.

======================  ==========================================================================
`url`                   reads URLs and their options, and masks passwords
`certificates`          checks that the files with certificates can be read
`opening`               opens a resource once, also for several tasks at the same time
`retention`             how long a store remembers ids and calls, in every driver alike
`clock`                 work that is due from time to time, and the sign of a stall
`batches`               cuts batches into parts that one call or one statement may carry
`deliveries`            hands out deliveries that were received, and suspects alone
`rows`                  records of the contract from rows of SQL tables
`dead_letter_keys`      reads keys of dead letters
`dead_letter_counts`    tells when dead letters have to be counted
======================  ==========================================================================
"""
