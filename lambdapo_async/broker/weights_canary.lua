-- Publish the canary of a version; whoever asked for one is answered.
-- KEYS[1] = state, KEYS[2] = canary, KEYS[3] = wish for a canary
-- ARGV[1] = fence, ARGV[2] = record
redis.call('SET', KEYS[2], ARGV[2])
redis.call('DEL', KEYS[3])
return {'OK'}
