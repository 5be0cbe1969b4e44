-- The queue agrees with its learner: actors may lease and offer again, as long as this server lives.
-- KEYS[1] = state
-- ARGV[1] = fence
redis.call('HSET', KEYS[1], 'server', server_id(), 'seen', now_ms())
return {'OK', redis.call('HINCRBY', KEYS[1], 'ticks', 1)}
