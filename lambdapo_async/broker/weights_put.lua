-- Store one piece; fenced, so that an old learner cannot write into a version of the new one.
-- KEYS[1] = state, KEYS[2] = chunk
-- ARGV[1] = fence, ARGV[2] = content
redis.call('SET', KEYS[2], ARGV[2])
return {'OK'}
