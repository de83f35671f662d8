"""Tasks and calls: their options, their arguments, and the handles that callers hold.

===============  ==================================================================
`option_table`   every option: name, values, scopes, setting, meaning
`options`        the options of a task or a call, as typed keywords and checked data
`celery_options` Celery's options, translated
`effective`      the options that hold: call over task over setting
`arguments`      the arguments, checked against a signature and converted
`call`           a task with its arguments, not yet sent
`definition`     a registered function and its options
`result`         how a task ended
`application`    `TaskQueue` as the parts below it see it
`handle`         `TaskHandle` and `AsyncResult`
`bound`          ``self`` in a task with ``bind=True``
`task`           `Task`: a registered function that can be called and sent
===============  ==================================================================
"""
